// SPDX-License-Identifier: Apache-2.0
// The filter: devices that have all words that were typed, one of the pressed verdicts, and one of the pressed findings.
// Without it all are shown. On paper everything is unfolded.
"use strict";
(() => {
  const bar = document.querySelector(".filter");
  const typed = bar.querySelector("input");
  const buttons = [...bar.querySelectorAll("button")];
  const said = bar.querySelector("output");
  const machines = [...document.querySelectorAll("section.machine")].map((part) => ({
    part,
    findings: [...part.querySelectorAll(".finding[data-devices]")],
    rows: [...part.querySelectorAll(".row")].map((row) => ({
      row,
      verdict: row.dataset.verdict,
      ids: (row.dataset.ids || "").split(" "),
      words: [...row.firstElementChild.children].map((cell) => cell.textContent).concat(row.dataset.more).join(" ").toLowerCase(),
    })),
  }));
  const total = machines.reduce((sum, machine) => sum + machine.rows.length, 0);
  const pressed = (kind) =>
    new Set(buttons.filter((b) => b.ariaPressed === "true" && b.dataset.kind === kind).map((b) => b.dataset.filter));
  const apply = () => {
    const words = typed.value.toLowerCase().split(/\s+/).filter(Boolean);
    const verdicts = pressed("verdict");
    const findings = pressed("finding");
    const all = !words.length && !verdicts.size && !findings.size;
    let count = 0;
    for (const machine of machines) {
      const ids = new Set();
      let here = 0;
      for (const { row, verdict, ids: own, words: text } of machine.rows) {
        const shown =
          (!verdicts.size || verdicts.has(verdict)) &&
          (!findings.size || own.some((id) => findings.has(id))) &&
          words.every((word) => text.includes(word));
        if (row.hidden === shown) row.hidden = !shown;
        if (shown) {
          here += 1;
          own.forEach((id) => ids.add(id));
        }
      }
      for (const finding of machine.findings) finding.hidden = !all && !ids.has(finding.dataset.finding);
      machine.part.hidden = !all && !here;
      count += here;
    }
    said.textContent = `${count} of ${total} devices`;
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      button.ariaPressed = button.ariaPressed === "true" ? "false" : "true";
      apply();
    });
  }
  typed.addEventListener("input", apply);
  const open = () => {
    const row = document.getElementById(location.hash.slice(1));
    if (row instanceof HTMLDetailsElement) row.open = true;
  };
  addEventListener("hashchange", open);
  addEventListener("beforeprint", () => {
    for (const row of document.querySelectorAll("details:not([open])")) {
      row.open = true;
      row.dataset.unfolded = "";
    }
  });
  addEventListener("afterprint", () => {
    for (const row of document.querySelectorAll("details[data-unfolded]")) {
      row.open = false;
      delete row.dataset.unfolded;
    }
  });
  bar.hidden = false;
  open();
  apply();
})();
