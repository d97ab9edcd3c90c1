() => {  // run once by gradio, when the page is there
// Gradio's names for screen readers are thin: a thumbnail's is its number, a box with a copy button has none.
new MutationObserver(() => {
  const name = (element, text) => { if (text && element.ariaLabel !== text) element.ariaLabel = text; };
  for (const button of document.querySelectorAll('.thumbnail-item'))
    name(button, button.querySelector('.caption-label')?.textContent);
  for (const label of document.querySelectorAll('.answer label'))
    name(label.querySelector('textarea'), label.querySelector('[data-testid=block-info]')?.textContent.trim());
}).observe(document.body, {childList: true, subtree: true, characterData: true});

document.addEventListener('keydown', event => {
  const id = {ArrowLeft: 'previous', ArrowRight: 'next'}[event.key], button = id && document.getElementById(id);
  const plain = !event.altKey && !event.ctrlKey && !event.metaKey && !event.shiftKey;
  // In a field, on a tab and in what scrolls, the arrows have a meaning already.
  if (plain && button?.offsetParent && !event.target.closest('input, textarea, [role=tab], [role=region]')) button.click();
}); }
