"use strict";
// Shows the pairs that are asked for, and the galleries that have any.
const filter = document.getElementById("filter");
if (filter) {
  const cards = [...document.querySelectorAll(".card")];
  const apply = () => {
    const { split, gallery, text } = filter.elements;
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const card of cards) {
      const content = card.textContent.toLowerCase();
      card.hidden = !(
        (!split.value || card.dataset.split === split.value) &&
        (!gallery.value || card.closest(".gallery").dataset.gallery === gallery.value) &&
        words.every((word) => content.includes(word))
      );
      shown += !card.hidden;
    }
    for (const one of document.querySelectorAll(".gallery")) one.hidden = !one.querySelector(".card:not([hidden])");
    filter.querySelector("output").textContent = `${shown} of ${cards.length} pairs shown`;
  };
  filter.addEventListener("input", apply);
  filter.addEventListener("submit", (event) => event.preventDefault());
  apply();
}
