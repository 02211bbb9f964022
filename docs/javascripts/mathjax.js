// The settings that pymdownx.arithmatex asks for; typeset again after each page that the theme loads by itself.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]], processEscapes: true },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex" },
};
if (typeof document$ !== "undefined") {
  document$.subscribe(() => window.MathJax.typesetPromise && window.MathJax.typesetPromise());
}
