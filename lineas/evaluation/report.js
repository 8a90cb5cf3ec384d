"use strict";
// Without this script the page says the same: tables stay in their order, and all texts are shown.

for (const table of document.querySelectorAll("table.sortable")) {
  const [body] = table.tBodies;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      for (const other of head.parentNode.cells) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", order);
      const value = (row) => row.cells[column].dataset.value;
      const sign = order === "ascending" ? 1 : -1;
      const compare = (a, b) => {
        if (!value(a) || !value(b)) return !value(a) - !value(b); // what is not known comes last
        return sign * (number(value(a)) - number(value(b))) || 0; // of two infinite ones neither
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}

function number(text) {
  return text === "inf" ? Infinity : text === "-inf" ? -Infinity : Number(text);
}

const picker = document.getElementById("pick");
if (picker) {
  const show = () => {
    for (const one of document.querySelectorAll("[data-point]"))
      one.hidden = picker.value !== "all" && one.dataset.point !== picker.value;
  };
  picker.addEventListener("change", show);
  picker.parentNode.hidden = false;
  show();
}

// Paper cannot be unfolded.
addEventListener("beforeprint", () => {
  for (const one of document.querySelectorAll("details")) one.open = true;
});
