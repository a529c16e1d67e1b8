"use strict";
(() => {
  const tip = document.getElementById("tip");

  const show = (mark) => {
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    const at = mark.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const left = Math.min(at.right + 6, width - tip.offsetWidth - 8);
    const above = at.top - tip.offsetHeight - 6;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (above > 8 ? above : at.bottom + 6) + "px";
  };
  const hide = () => { tip.hidden = true; };

  for (const plot of document.querySelectorAll("svg.plot")) {
    const marks = [...plot.querySelectorAll(".mark")];
    if (marks.length === 0) continue;
    // One stop for the tab key; arrows go from mark to mark.
    let current = marks[0];
    current.setAttribute("tabindex", "0");
    const go = (mark) => {
      current.setAttribute("tabindex", "-1");
      current = mark;
      current.setAttribute("tabindex", "0");
      current.focus();
    };
    for (const mark of marks) {
      mark.querySelector("title").remove(); // the tooltip below says the same
      mark.addEventListener("pointerenter", () => show(mark));
      mark.addEventListener("pointerleave", hide);
      mark.addEventListener("focus", () => show(mark));
      mark.addEventListener("blur", hide);
      mark.addEventListener("click", () => go(mark));
    }
    plot.addEventListener("keydown", (event) => {
      const at = marks.indexOf(current);
      const next = {
        ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1,
        Home: 0, End: marks.length - 1,
      }[event.key];
      if (event.key === "Escape") hide();
      if (next === undefined) return;
      event.preventDefault();
      go(marks[Math.max(0, Math.min(marks.length - 1, next))]);
    });
  }
  window.addEventListener("scroll", hide, { passive: true });
})();
