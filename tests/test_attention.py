import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from autocompress import export
from autocompress.models.attention import Attention, own_names, unfold
from autocompress.models.trace import count
from autocompress.tasks import InputSpec

N, L, S, WIDTH = 3, 5, 7, 16


class Holder(nn.Module):
    """Self-attention over rows of (n, l, width), with a head."""

    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True, **settings)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, rows):
        mixed, _ = self.attention(rows, rows, rows, need_weights=False)
        return self.head(rows + mixed).mean(1)


def twins(**settings):
    torch.manual_seed(0)
    fused = nn.MultiheadAttention(WIDTH, 4, **settings).eval()
    for parameter in fused.parameters():
        nn.init.normal_(parameter, std=0.3)  # biases are made as zeros
    unfolded = unfold(nn.Sequential(copy.deepcopy(fused)))[0]
    assert isinstance(unfolded, Attention)
    return fused, unfolded


def inputs(batch_first=True, kdim=WIDTH, vdim=WIDTH):
    generator = torch.Generator().manual_seed(1)
    made = (torch.randn(N, length, width, generator=generator) for length, width in ((L, WIDTH), (S, kdim), (S, vdim)))
    return tuple(one if batch_first else one.transpose(0, 1) for one in made)


PADDING = torch.zeros(N, S, dtype=torch.bool)
PADDING[0, 3:] = PADDING[2, 6:] = True
FORBIDDEN = torch.ones(L, S, dtype=torch.bool).triu(3)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    ("settings", "masks"),
    [
        ({}, {}),
        ({"bias": False}, {}),
        ({"kdim": 6, "vdim": 10}, {}),
        ({}, {"key_padding_mask": PADDING}),
        ({}, {"attn_mask": FORBIDDEN}),
        ({}, {"attn_mask": torch.randn(L, S)}),
        ({}, {"attn_mask": torch.randn(N * 4, L, S), "key_padding_mask": torch.randn(N, S)}),
        ({}, {"attn_mask": FORBIDDEN, "key_padding_mask": PADDING}),
    ],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_it_answers_what_torch_answers(settings, masks, batch_first, need_weights):
    fused, unfolded = twins(batch_first=batch_first, **settings)
    given = inputs(batch_first, settings.get("kdim", WIDTH), settings.get("vdim", WIDTH))
    expected, weights = fused(*given, need_weights=need_weights, **masks)
    found, shares = unfolded(*given, need_weights=need_weights, **masks)
    torch.testing.assert_close(found, expected)
    if not need_weights:
        assert shares is None
        return
    torch.testing.assert_close(shares, weights)
    per_head = {"average_attn_weights": False, **masks}
    torch.testing.assert_close(unfolded(*given, **per_head)[1], fused(*given, **per_head)[1])


def test_a_single_sequence_needs_no_batch_axis():
    fused, unfolded = twins()
    given = tuple(one[0] for one in inputs())
    torch.testing.assert_close(unfolded(*given, PADDING[0]), fused(*given, PADDING[0]))


def test_a_causal_hint_without_its_mask_is_refused_as_by_torch():
    fused, unfolded = twins(batch_first=True)
    for attention in (fused, unfolded):
        with pytest.raises(RuntimeError, match="is_causal hint"):
            attention(*inputs(), is_causal=True, need_weights=False)


def test_dropout_is_of_training_alone():
    _, unfolded = twins(dropout=0.5, batch_first=True)
    given = inputs()
    torch.testing.assert_close(unfolded(*given)[0], unfolded(*given)[0])
    unfolded.train()
    for need_weights in (False, True):
        one, other = (unfolded(*given, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.equal(one, other)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"
)  # the original's
def test_torchs_encoder_layers_do_not_look_for_what_is_gone(norm_first, training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).train(training)
    unfolded = unfold(copy.deepcopy(encoder))
    query, rows, _ = inputs()
    with torch.no_grad():  # where torch takes its fast path
        torch.testing.assert_close(unfolded(query), encoder(query))
        found, expected = (one(rows, src_key_padding_mask=PADDING)[~PADDING] for one in (unfolded, encoder))
    torch.testing.assert_close(found, expected)


def test_torchs_whole_transformer():
    torch.manual_seed(0)
    whole = nn.Transformer(WIDTH, 4, 1, 1, 32, dropout=0.0, batch_first=True).eval()
    query, key, _ = inputs()
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    expected = whole(key, query, tgt_mask=causal, tgt_is_causal=True)
    torch.testing.assert_close(unfold(whole)(key, query, tgt_mask=causal, tgt_is_causal=True), expected)
    assert not [part for part in whole.modules() if isinstance(part, nn.MultiheadAttention)]


@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"kdim": WIDTH, "vdim": WIDTH + 1}])
def test_weights_saved_before_load_after(settings):
    fused, unfolded = twins(**settings)
    saved = {f"0.{name}": tensor.clone() for name, tensor in fused.state_dict().items()}
    holder = nn.Sequential(copy.deepcopy(unfolded))
    for parameter in holder.parameters():
        nn.init.zeros_(parameter)
    names = set(saved)
    holder.load_state_dict(saved)
    assert set(saved) == names
    for name, tensor in unfolded.state_dict().items():
        torch.testing.assert_close(holder[0].state_dict()[name], tensor)
    assert set(own_names(holder, saved)) == set(holder.state_dict())
    assert own_names(holder, holder.state_dict()).keys() == holder.state_dict().keys()
    holder.load_state_dict(own_names(holder, saved))
    holder.load_state_dict(holder.state_dict())


def test_copies_and_pickles_go_on_like_the_original():
    module = Holder().eval()
    saved = copy.deepcopy(module.state_dict())
    rows = inputs()[0]
    expected = module(rows)
    unfold(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        nn.init.zeros_(twin.attention.q.weight)
        twin.load_state_dict(saved)
        torch.testing.assert_close(twin(rows), expected)
        torch.testing.assert_close(module(rows), expected)


def test_what_is_shared_stays_shared_and_no_random_number_is_drawn():
    one = nn.MultiheadAttention(WIDTH, 4)
    other = nn.MultiheadAttention(WIDTH, 4)
    other.in_proj_weight, other.out_proj.weight = one.in_proj_weight, one.out_proj.weight
    other.in_proj_weight.requires_grad_(False)
    module = nn.Sequential(one, other, one)
    before = torch.random.get_rng_state()
    unfold(module)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert module[0] is module[2]
    assert module[0].q.weight is module[1].q.weight
    assert module[0].q.bias is not module[1].q.bias
    assert module[0].proj.weight is module[1].proj.weight
    assert not module[0].k.weight.requires_grad
    assert module[0].proj.bias.requires_grad


def test_a_network_that_is_an_attention_itself():
    fused, _ = twins(batch_first=True)
    given = inputs()
    torch.testing.assert_close(unfold(fused)(*given), fused(*given))


def test_hooks_and_modes_come_along():
    module = nn.Sequential(nn.MultiheadAttention(WIDTH, 4).eval())
    seen = []
    module[0].register_forward_hook(lambda *_: seen.append("after"))
    module[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    unfold(module)
    module[0](*(one.transpose(0, 1) for one in inputs()))
    assert seen == ["before", "after"]
    assert not module[0].training


def test_its_products_are_counted():
    module = unfold(Holder())
    macs, parameters = count(module, inputs()[0])
    assert parameters == 4 * WIDTH * (WIDTH + 1) + 3 * (WIDTH + 1)
    assert macs == L * (4 * WIDTH * WIDTH + 2 * L * WIDTH + 3 * WIDTH)


def test_what_computes_otherwise_is_left_as_it_is():
    class Own(nn.MultiheadAttention):
        def forward(self, query, *_, **__):
            return query, None

    parts = [
        Own(WIDTH, 4),
        nn.MultiheadAttention(WIDTH, 4, add_bias_kv=True),
        nn.MultiheadAttention(4, 2, add_zero_attn=True),
    ]
    module = nn.Sequential(*parts)
    assert list(unfold(module)) == parts


def test_cut_heads_are_gone_and_nothing_else():
    _, whole = twins(batch_first=True)
    given, size = inputs(), WIDTH // 4
    kept = torch.cat([torch.arange(size), torch.arange(2 * size, 3 * size)])  # heads 0 and 2
    cut = copy.deepcopy(whole)
    for layer in (cut.q, cut.k, cut.v):
        layer.weight, layer.bias = nn.Parameter(layer.weight[kept]), nn.Parameter(layer.bias[kept])
        layer.out_features = len(kept)
    cut.proj.weight, cut.proj.in_features = nn.Parameter(cut.proj.weight[:, kept]), len(kept)
    cut.heads = 2
    with torch.no_grad():
        whole.proj.weight[:, [i for i in range(WIDTH) if i not in kept]] = 0
    torch.testing.assert_close(cut(*given)[0], whole(*given)[0])
    assert cut(*given)[1].shape == (N, L, S)


@pytest.mark.parametrize(("exporter", "opset"), [("torchscript", 17), ("dynamo", 18)])
def test_the_file_agrees_at_any_batch_size(exporter, opset):
    torch.manual_seed(0)
    module = unfold(Holder())
    exported = export.export(module, InputSpec(shape=(L, WIDTH)), opset=opset, exporter=exporter)
    model = export.compose(exported)
    for size in (1, 2, 9):
        rows = np.random.default_rng(size).standard_normal((size, L, WIDTH)).astype(np.float32)
        assert export.parity(module, model, rows) < 1e-5
    assert {"attention.q", "attention.k", "attention.v", "attention.proj", "head"} <= set(exported.parts[0].nodes)
