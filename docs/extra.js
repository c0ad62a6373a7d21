// What scrolls can be reached with the keyboard, and the bars of code blocks have names of their own (axe-core:
// scrollable-region-focusable, landmark-unique). The theme makes the bars after the page is there, hence the observer.
document$.subscribe(() => {
  const mend = () => {
    for (const part of document.querySelectorAll(".md-typeset pre > code, .md-typeset__scrollwrap"))
      if (part.scrollWidth > part.clientWidth) part.tabIndex = 0
    document.querySelectorAll(".md-code__nav").forEach((bar, at) => bar.setAttribute("aria-label", `Code block ${at + 1}`))
  }
  mend()
  addEventListener("resize", mend)
  new MutationObserver(mend).observe(document.querySelector(".md-content"), {childList: true, subtree: true})
})
