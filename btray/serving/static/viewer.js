"use strict";
// A card that shows the model's answers: for a picture, or for the slices of a series, through which one scrolls. Text
// only ever becomes text nodes; nothing of a file's name or an answer is read as HTML.

export const byId = (id) => document.getElementById(id);
export const percent = (share) => (100 * share).toFixed(1) + " %";
const THUMB = 16; // pixels, as in page.css
const NOTCH = 40; // pixels that a wheel or a finger moves for one slice
let cards = 0;

export function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

export const count = (number, noun, nouns = noun + "s") => `${number} ${number === 1 ? noun : nouns}`;

export function cardOf(template, title) {
  const card = byId(template).content.firstElementChild.cloneNode(true);
  const heading = card.querySelector("h2, h3");
  heading.textContent = title;
  heading.id = `card-${++cards}`;
  card.setAttribute("aria-labelledby", heading.id);
  return card;
}

function warning(kind, title, text) {
  const place = element("p", undefined, "mark " + kind);
  place.append(element("strong", title), element("span", text));
  return place;
}

export function refusal(title, reasons) {
  const card = cardOf("card", title);
  const text = reasons.length === 1 ? reasons[0] : "";
  card.querySelector(".columns").replaceWith(warning("", "Not classified", text));
  if (reasons.length > 1) {
    const list = element("ul", undefined, "how");
    list.append(...reasons.map((reason) => element("li", reason)));
    card.append(list);
  }
  return card;
}

// What makes an answer doubtful, for a frame or a study: the gravest first.
export function doubts({ out_of_distribution: unlike, abstained }) {
  const found = [];
  if (unlike) {
    found.push(warning("", "Unlike the training images", "The model was not made for such an image: do not rely on its answer."));
  }
  if (abstained) {
    found.push(warning("doubtful", "The model abstains", "Its confidence is below the threshold: what follows is a guess."));
  }
  return found;
}

export function showLabel(place, { label, confidence, abstained, out_of_distribution: unlike }) {
  place.textContent = (abstained || unlike ? "Perhaps " : "") + label + " ";
  place.append(element("small", percent(confidence)));
}

function bar([name, share]) {
  const item = element("li");
  const text = element("div", undefined, "text");
  text.append(element("span", name), element("span", percent(share)));
  const track = element("div", undefined, "track");
  track.setAttribute("aria-hidden", "true");
  track.append(element("i"));
  track.firstChild.style.width = percent(share).replace(" ", "");
  item.append(text, track);
  return item;
}

// Slices from foot to head (or along whatever their normal is); those without a place last, as their files come.
function byPlace({ answer: a, file: f }, { answer: b, file: g }) {
  return (
    (a.plane || "").localeCompare(b.plane || "") ||
    (a.position_mm ?? Infinity) - (b.position_mm ?? Infinity) ||
    f - g ||
    a.frame - b.frame
  );
}

export class Viewer {
  // `isSeries`: more slices may come; else the answer for one picture is all.
  constructor(title, isSeries = false) {
    this.title = title;
    this.slices = [];
    this.ranks = new Map(); // slice -> its rank among the key frames, from 1
    this.now = null;
    this.touched = false;
    this.card = cardOf("card", title);
    this.scroll = this.part(".scroll");
    this.part(".bars").setAttribute("aria-label", "Calibrated probabilities of " + title);
    this.prepareHeat();
    if (isSeries) this.prepareScrolling();
    else this.scroll.remove();
  }

  part(selector) {
    return this.card.querySelector(selector);
  }

  prepareHeat() {
    const slider = this.part(".slider input");
    const toggle = this.part(".toggle");
    slider.setAttribute("aria-label", "Heat map over " + this.title);
    const set = () => {
      this.part(".heat").style.opacity = String(slider.value / 100);
      this.part(".slider output").textContent = slider.value + " %";
    };
    slider.addEventListener("input", set);
    toggle.addEventListener("click", () => {
      const shown = this.part(".heat").classList.toggle("off") === false;
      toggle.setAttribute("aria-pressed", String(shown));
      toggle.textContent = shown ? "On" : "Off";
    });
    set();
  }

  prepareScrolling() {
    const stack = this.part(".stack");
    const slider = this.slider;
    slider.setAttribute("aria-label", "Slice of " + this.title);
    this.part(".keys").setAttribute("aria-label", "Key frames of " + this.title);
    this.part(".answer").prepend(this.part(".marks")); // where it moves no picture
    slider.addEventListener("input", () => this.go(Number(slider.value)));
    let turned = 0;
    const turn = (event) => {
      turned += event.deltaMode ? NOTCH * event.deltaY : event.deltaY;
      const step = Math.abs(turned) < NOTCH ? 0 : Math.sign(turned);
      if (!this.slices[this.at + Math.sign(turned)]) turned = 0; // at an end the page scrolls
      else event.preventDefault();
      if (!step || !turned) return;
      turned = 0;
      this.go(this.at + step);
    };
    stack.addEventListener("wheel", turn, { passive: false });
    let from = null;
    stack.addEventListener("pointerdown", (event) => {
      from = { x: event.clientX, at: this.at };
      stack.setPointerCapture(event.pointerId);
      slider.focus({ preventScroll: true });
      event.preventDefault(); // else the focus goes
    });
    stack.addEventListener("pointermove", (event) => {
      if (!from) return;
      const step = Math.min(NOTCH, stack.clientWidth / this.slices.length);
      const at = from.at + Math.round((event.clientX - from.x) / step);
      this.go(Math.max(0, Math.min(at, this.slices.length - 1)));
    });
    for (const end of ["pointerup", "pointercancel"]) stack.addEventListener(end, () => (from = null));
  }

  get slider() {
    return this.part(".slices");
  }

  get at() {
    return this.slices.indexOf(this.now);
  }

  add(slices) {
    this.slices = [...this.slices, ...slices].sort(byPlace);
    this.now ??= this.slices[0];
    this.slider && this.arrange();
    this.show(this.now);
  }

  // The key frames, those with the most tumor first.
  mark(keyFrames) {
    this.ranks = new Map(keyFrames.map((slice, number) => [slice, number + 1]));
    this.arrange();
    this.show(this.touched || !keyFrames.length ? this.now : keyFrames[0]);
  }

  arrange() {
    const last = this.slices.length - 1;
    this.slider.max = String(last);
    this.scroll.hidden = last === 0;
    const ranked = [...this.ranks].map(([slice, rank]) => [this.slices.indexOf(slice), rank]);
    const ticks = ranked.map(([at, rank]) => {
      const tick = element("i", undefined, rank === 1 ? "first" : "");
      tick.style.left = `calc(${THUMB / 2}px + ${last ? at / last : 0} * (100% - ${THUMB}px))`;
      return tick;
    });
    this.part(".ticks").replaceChildren(...ticks);
    const buttons = ranked.map(([at, rank]) => {
      const button = element("button", String(at + 1));
      button.type = "button";
      button.setAttribute("aria-label", `Key frame ${rank}: slice ${at + 1}`);
      button.addEventListener("click", () => this.go(at));
      return button;
    });
    this.part(".keys").hidden = !buttons.length;
    this.part(".keys span").replaceChildren(...buttons);
  }

  go(at) {
    if (!this.slices[at]) return;
    this.touched = true;
    this.show(this.slices[at]);
  }

  show(slice) {
    this.now = slice;
    const { answer, picture } = slice;
    let name = this.title;
    if (this.slider) {
      const place = answer.position_mm === undefined ? "" : `${answer.position_mm.toFixed(1)} mm`;
      const rank = this.ranks.has(slice) ? `key frame ${this.ranks.get(slice)}` : "";
      const which = `Slice ${this.at + 1} of ${this.slices.length}`;
      name += ", " + which.toLowerCase();
      this.slider.value = String(this.at);
      const said = [which, place, `${answer.label} ${percent(answer.confidence)}`, rank];
      this.slider.setAttribute("aria-valuetext", said.filter(Boolean).join(", "));
      this.part(".which").textContent = which;
      this.part(".place").textContent = [place, rank].filter(Boolean).join(" · ");
      for (const button of this.card.querySelectorAll(".keys button")) {
        button.setAttribute("aria-current", String(Number(button.textContent) === this.at + 1));
      }
    }
    this.showPicture(answer, picture, name);
    this.showAnswer(answer);
  }

  showPicture(answer, picture, name) {
    const [plain, heat] = [this.part(".slice"), this.part(".heat")];
    plain.hidden = heat.hidden = !picture;
    this.part(".unseen").hidden = Boolean(picture);
    if (!picture) {
      this.part(".unseen").textContent = answer.burned_in
        ? "Not shown: the file says that text is burned into this slice, which may name the patient."
        : "No picture came with this slice.";
      plain.removeAttribute("src");
      heat.removeAttribute("src");
      return;
    }
    plain.src = "data:image/png;base64," + picture.slice_png;
    plain.alt = "Slice of " + name;
    heat.src = "data:image/png;base64," + picture.heat_png;
    heat.alt = "Heat map for " + answer.label;
  }

  showAnswer(answer) {
    this.part(".marks").replaceChildren(...doubts(answer));
    showLabel(this.part(".label"), answer);
    const doubt = this.part(".doubt");
    doubt.hidden = answer.label_set.length < 2;
    doubt.textContent = "Cannot be ruled out: " + answer.label_set.join(", ");
    this.part(".bars").replaceChildren(...Object.entries(answer.probabilities).map(bar));
    const unusual = answer.ood_score === null ? "" : ` Unusualness ${answer.ood_score.toFixed(2)}, about 1 for training images.`;
    this.part(".answer .how").textContent = `Calibrated probabilities.${unusual} Model ${answer.model_id.slice(0, 12)}.`;
  }
}
