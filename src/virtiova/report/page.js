// SPDX-License-Identifier: Apache-2.0
// The filter: rows whose observed path, or verdict, is among the pressed buttons. Without it all rows are shown.
"use strict";
(() => {
  const bar = document.querySelector(".filter");
  const buttons = [...bar.querySelectorAll("button")];
  const rows = [...document.querySelectorAll(".row")];
  const shown = bar.querySelector("output");
  const apply = () => {
    const wanted = new Set(buttons.filter((b) => b.ariaPressed === "true").map((b) => b.dataset.filter));
    let count = 0;
    for (const row of rows) {
      row.hidden = wanted.size > 0 && !wanted.has(row.dataset.path) && !wanted.has(row.dataset.verdict);
      count += row.hidden ? 0 : 1;
    }
    for (const part of document.querySelectorAll("section.system")) {
      part.hidden = !part.querySelector(".row:not([hidden])");
    }
    shown.textContent = `${count} of ${rows.length} cells`;
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      button.ariaPressed = button.ariaPressed === "true" ? "false" : "true";
      apply();
    });
  }
  bar.hidden = false;
  apply();
})();
