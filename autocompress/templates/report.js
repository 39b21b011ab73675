// Tooltips, copy buttons and sortable columns; the page reads without them.
const tip = document.getElementById("tip");
for (const title of document.querySelectorAll("svg title")) {
  const shape = title.parentNode;
  shape.setAttribute("data-t", title.textContent);
  shape.setAttribute("aria-label", title.textContent);
  title.remove();
}
const place = (event) => {
  const box = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
  const below = event.clientY + 16 + box.height < innerHeight;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = (below ? event.clientY + 16 : event.clientY - box.height - 12) + "px";
};
for (const shape of document.querySelectorAll("[data-t]")) {
  const same = shape.dataset.n ? document.querySelectorAll(`svg [data-n="${CSS.escape(shape.dataset.n)}"]`) : [];
  shape.addEventListener("pointerenter", (event) => {
    tip.textContent = shape.dataset.t;
    tip.style.display = "block";
    place(event);
    same.forEach((one) => one.classList.add("hot"));
  });
  shape.addEventListener("pointermove", place);
  shape.addEventListener("pointerleave", () => {
    tip.style.display = "none";
    same.forEach((one) => one.classList.remove("hot"));
  });
}
for (const block of document.querySelectorAll("pre.command")) {
  const button = document.createElement("button");
  button.className = "copy";
  button.textContent = "copy";
  const text = block.textContent.trim();
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const range = document.createRange();
      range.selectNodeContents(block.querySelector("code"));
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
    }
    button.textContent = "copied";
    setTimeout(() => (button.textContent = "copy"), 1500);
  });
  block.append(button);
}
for (const head of document.querySelectorAll("table.sortable th")) {
  head.classList.add("sort");
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0];
    const down = head.dataset.down !== "yes";
    head.dataset.down = down ? "yes" : "no";
    const key = (row) => row.cells[head.cellIndex].dataset.v ?? row.cells[head.cellIndex].textContent;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      const order = isNaN(x) || isNaN(y) ? String(x).localeCompare(String(y)) : Number(x) - Number(y);
      return down ? -order : order;
    });
    body.append(...rows);
  });
}
