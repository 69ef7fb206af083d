"use strict";
// Leafs through the slices of one case. Every panel is the same grey slice with its own labels.
(() => {
  const root = document.getElementById("viewer");
  if (!root) return;
  const cases = JSON.parse(document.getElementById("viewer-data").textContent);
  const [select, slider, number, overlay, panels, status] = [
    "viewer-case", "viewer-slice", "viewer-number", "viewer-labels", "viewer-panels", "viewer-status",
  ].map((name) => document.getElementById(name));
  const OPACITY = 0.6;
  let current = null;

  const load = (source) => {
    const image = new Image();
    image.src = source;
    return image.decode().then(() => image);
  };

  // Names come from files: they are set as text, never as markup.
  const panel = (shown, title) => {
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    const caption = document.createElement("figcaption");
    canvas.width = shown.width;
    canvas.height = shown.height;
    canvas.style.aspectRatio = shown.ratio;
    canvas.classList.toggle("coarse", shown.width < 120);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", title);
    caption.textContent = title;
    figure.append(canvas, caption);
    panels.append(figure);
    return canvas.getContext("2d");
  };

  const draw = () => {
    if (!current) return;
    const { shown, image, layers } = current;
    const index = Number(slider.value);
    const tile = [
      (index % shown.columns) * shown.width,
      Math.floor(index / shown.columns) * shown.height,
      shown.width,
      shown.height,
    ];
    for (const { context, sheet } of layers) {
      context.globalAlpha = 1;
      context.clearRect(0, 0, shown.width, shown.height);
      context.drawImage(image, ...tile, 0, 0, shown.width, shown.height);
      if (sheet && overlay.checked) {
        context.globalAlpha = OPACITY;
        context.drawImage(sheet, ...tile, 0, 0, shown.width, shown.height);
      }
    }
    number.textContent = `slice ${shown.numbers[index]} of ${shown.total}`;
    slider.setAttribute("aria-valuetext", number.textContent);
  };

  const choose = async () => {
    const shown = cases[Number(select.value)];
    current = null;
    try {
      const sheets = await Promise.all([shown.image, ...shown.labels.map((pair) => pair[1])].map(load));
      // Another case may have been chosen while this one was decoded.
      if (shown !== cases[Number(select.value)]) return;
      panels.replaceChildren();
      const titles = [shown.modality, ...shown.labels.map((pair) => pair[0])];
      const layers = titles.map((title, place) => ({
        context: panel(shown, title),
        sheet: place ? sheets[place] : null,
      }));
      current = { shown, image: sheets[0], layers };
      slider.max = shown.numbers.length - 1;
      slider.value = shown.start;
      status.textContent = shown.why;
      draw();
    } catch (error) {
      status.textContent = `The slices of ${shown.name} cannot be shown: ${error.message}`;
    }
  };

  const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 };
  root.addEventListener("keydown", (event) => {
    if (event.target === select || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "l") {
      overlay.checked = !overlay.checked;
    } else if (event.key in steps) {
      slider.value = Number(slider.value) + steps[event.key];
    } else {
      return;
    }
    event.preventDefault();
    draw();
  });
  slider.addEventListener("input", draw);
  overlay.addEventListener("change", draw);
  select.addEventListener("change", choose);
  cases.forEach((shown, place) => select.append(new Option(shown.name, place)));
  root.hidden = false;
  choose();
})();
