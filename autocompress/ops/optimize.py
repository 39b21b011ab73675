"""What onnxruntime's offline optimizer makes of a file: batch norms folded, constants folded, nodes fused."""

from __future__ import annotations

from collections import Counter

import onnx
import onnxruntime

from autocompress import onnxfile
from autocompress.types import Profile, TrialFailure, UserError

_BESIDE = "session.optimized_model_external_initializers_file_name"
_FROM = "session.optimized_model_external_initializers_min_size_in_bytes"


def optimized(model: bytes, profile: Profile) -> bytes:
    """The file as onnxruntime runs it on a profile's provider: loads faster, for this version and processor only.

    Raises TrialFailure if it cannot be loaded there.
    """
    with onnxfile.scratch(2 * len(model)) as folder:
        target = folder / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(target)
        options.intra_op_num_threads, options.inter_op_num_threads = profile.threads, 1
        options.log_severity_level = 4  # it warns that the file is for this machine, which is what is asked for
        provider = (profile.provider, dict(profile.provider_options))
        if len(model) > onnxfile.LIMIT:
            options.add_session_config_entry(_BESIDE, f"{target.name}.data")
            options.add_session_config_entry(_FROM, str(onnxfile.LEAST))
        try:
            onnxfile.session(model, options, [provider])
        except (TrialFailure, UserError):
            raise
        except Exception as error:
            # onnxruntime's exceptions share no base class
            raise TrialFailure(f"onnxruntime cannot optimize the file: {' '.join(str(error).split())[:300]}") from error
        return onnxfile.load(target)


def fused(model: bytes, made: bytes) -> dict[str, int]:
    """Nodes by operation that the optimizer made of a file, positive, and that went, negative; "nodes" is their sum.

    `made` is what `optimized` gave for it.
    """
    before, after = (_operations(onnxfile.read(one, weights=False)) for one in (model, made))
    changes = {name: after[name] - before[name] for name in sorted({*before, *after})}
    total = sum(changes.values())
    return {name: change for name, change in changes.items() if change} | ({"nodes": total} if total else {})


def _operations(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)
