"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const make = (tag, text, name) => { const node = document.createElement(tag); if (text !== undefined) node.textContent = text; if (name) node.className = name; return node; };

// Tables: a heading sorts its column, best first; a second time turns it around. Cells without a number stay below, open entries apart.
for (const button of document.querySelectorAll(".sort")) button.addEventListener("click", () => {
  const head = button.closest("th"), bodies = head.closest("table").tBodies;
  const column = head.cellIndex, higher = button.querySelector("[aria-label]").textContent === "↑";
  const before = head.getAttribute("aria-sort"), best = higher ? "descending" : "ascending", worst = higher ? "ascending" : "descending";
  const order = before === best ? worst : best;
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const value = row => { const text = row.cells[column].dataset.v; return text === "" ? null : Number(text); };
  for (const body of bodies) body.append(...[...body.rows].filter(row => row.dataset.name).sort((a, b) => {
    const x = value(a), y = value(b);
    if (x === null || y === null) return (x === null) - (y === null);
    return order === "ascending" ? x - y : y - x;
  }));
});

// Filter: rows of all tables whose name or reason holds every word.
const filter = byId("filter"), filtered = byId("filtered");
filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean), seen = new Set();
  for (const body of document.querySelectorAll(".board tbody")) {
    const rows = [...body.rows].filter(row => row.dataset.name);
    for (const row of rows) {
      row.hidden = !words.every(word => row.dataset.name.toLowerCase().includes(word));
      if (!row.hidden) seen.add(row.querySelector("th > span").textContent);
    }
    body.hidden = rows.every(row => row.hidden);
  }
  filtered.textContent = words.length ? `${seen.size} of ${data.rows} contenders` : "";
});

// Cells: where a number came from.
const pairs = entries => {
  const list = make("dl");
  for (const [name, text] of entries) if (text !== undefined && text !== null && text !== "") list.append(make("dt", name), make("dd", String(text)));
  return list;
};
document.addEventListener("click", event => {
  const cell = event.target.closest(".cell");
  if (!cell) return;
  const set = cell.dataset, body = byId("source-body");
  byId("source-title").textContent = set.of;
  body.replaceChildren(pairs([["value", set.full], ["from", set.n], ["rank", set.rank && `${set.rank}, 95 % interval over all pairs of the column`],
    ["division", set.open === undefined ? null : set.open ? `open: ${set.open}` : "closed"], ["note", set.why]]));
  for (const number of (set.from || "").split(" ").filter(Boolean)) {
    const item = data.sources[Number(number)];
    const scorer = item.scorer ? `${item.scorer}, version ${item.scorer_version}` : null;
    const commit = item.commit ? item.commit + (item.dirty ? ", with changes that were not committed" : "") : "not in a repository";
    const list = pairs([["run", item.run], ["training seed", item.training_seed], ["scorer", scorer], ["weights sha256", item.weights_sha256],
      ["suite sha256", item.suite_sha256], ["run fingerprint", item.fingerprint], ["commit", commit], ["rfbench", item.version]]);
    list.className = "run";
    body.append(list);
  }
  byId("source").showModal();
});
byId("source").addEventListener("click", event => { if (event.target === byId("source")) byId("source").close(); });

// A link to one claim shows that claim alone, opened; any other place shows them all.
const alone = () => {
  const claim = location.hash.startsWith("#claim-") ? byId(decodeURIComponent(location.hash.slice(1))) : null;
  if (byId("claims")) byId("claims").classList.toggle("alone", claim !== null);
  if (!claim) return;
  claim.querySelector(".deciding").open = true;
  byId("claims").scrollIntoView();
};
addEventListener("hashchange", alone);
alone();

// Legends: which contenders the plots show. Of many, the first few at the start: bands of a dozen hide each other.
const main = byId("main");
const show = (row, on) => {
  main.classList.toggle(`hide-${row}`, !on);
  for (const chip of document.querySelectorAll(`.chip[data-row="${row}"]`)) chip.setAttribute("aria-pressed", String(on));
};
for (const chip of document.querySelectorAll(".chip")) chip.addEventListener("click", () => {
  if (chip.dataset.row !== undefined) return show(chip.dataset.row, chip.getAttribute("aria-pressed") !== "true");
  for (const other of chip.parentNode.querySelectorAll("[data-row]")) show(other.dataset.row, chip.classList.contains("all"));
});
for (const chip of document.querySelectorAll(".chip[data-row]")) if (data.rows > 8 && Number(chip.dataset.row) >= 6) show(chip.dataset.row, false);

// Players: all canvases of a scene follow one clock. A frame is drawn into a canvas of its own size first, because scaling
// straight from the sheet would bleed its neighbours into its edges. An embedded video keeps to the clock as well.
const player = () => {
  const films = byId("films"), slider = byId("time"), clock = byId("clock"), button = byId("play");
  let scene = null, tracks = [], now = 0, playing = false, last = null, turn = 0;
  const draw = () => {
    for (const track of tracks) {
      if (track.playing) {
        if (!playing || Math.abs(track.playing.currentTime - now) > 0.1) track.playing.currentTime = Math.min(now + 0.5 / scene.fps, track.playing.duration || now);
        continue;
      }
      const frame = Math.min(track.frames - 1, Math.floor(now * track.fps + 1e-6));
      if (!track.ready || frame === track.shown) continue;
      track.shown = frame;
      const { width, height, columns } = track;
      track.small.drawImage(track.image, (frame % columns) * width, Math.floor(frame / columns) * height, width, height, 0, 0, width, height);
      track.large.drawImage(track.small.canvas, 0, 0, track.large.canvas.width, track.large.canvas.height);
    }
    slider.value = String(Math.round(now * scene.fps));
    clock.textContent = `${now.toFixed(2)} s`;
  };
  const tick = time => {
    if (!playing) return;
    if (last !== null) now = (now + (time - last) / 1000 * Number(byId("rate").value)) % scene.seconds;
    last = time;
    draw();
    requestAnimationFrame(tick);
  };
  const play = on => {
    if (on === playing) return;
    playing = on;
    last = null;
    button.textContent = on ? "Pause" : "Play";
    button.setAttribute("aria-pressed", String(on));
    for (const { playing: video } of tracks) if (video) {
      video.playbackRate = Number(byId("rate").value);
      on ? video.play().catch(() => {}) : video.pause();
    }
    if (on) requestAnimationFrame(tick);
  };
  const step = by => {
    play(false);
    const frames = Math.round(scene.seconds * scene.fps);
    now = ((Math.round(now * scene.fps) + by + frames) % frames) / scene.fps;
    draw();
  };
  const open = number => {
    const mine = ++turn;
    scene = data.scenes[number];
    now = 0;
    slider.max = String(Math.round(scene.seconds * scene.fps) - 1);
    byId("prompt").textContent = `“${scene.prompt}”`;
    films.replaceChildren();
    tracks = scene.films.map(film => {
      const figure = make("figure", undefined, `r${film.number}`), caption = make("figcaption");
      caption.append(make("i", undefined, `swatch c${film.number % 8} d${Math.floor(film.number / 8)}`), film.name);
      films.append(figure);
      if (film.video) {
        const video = make("video");
        Object.assign(video, { src: film.video, muted: true, playsInline: true, loop: true, preload: "auto" });
        video.setAttribute("aria-label", `${film.name}: ${scene.prompt}`);
        video.addEventListener("loadeddata", () => { if (mine === turn) draw(); });
        figure.append(video, caption);
        return { playing: video };
      }
      if (film.link) {
        const link = make("a", "video");
        link.href = film.link;
        link.setAttribute("aria-label", `video of ${film.name}, all frames`);
        caption.append(" · ", link);
      }
      const canvas = make("canvas"), small = make("canvas");
      const scale = Math.max(1, Math.round(384 / film.width));
      canvas.width = film.width * scale;
      canvas.height = film.height * scale;
      small.width = film.width;
      small.height = film.height;
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${film.name}: ${scene.prompt}`);
      figure.append(canvas, caption);
      const track = { ...film, small: small.getContext("2d"), large: canvas.getContext("2d"), image: new Image(), ready: false, shown: -1 };
      track.large.imageSmoothingEnabled = true;
      track.large.imageSmoothingQuality = "high";
      track.image.onload = () => { track.ready = true; if (mine === turn) draw(); };
      track.image.src = film.sheet;
      return track;
    });
    draw();
    if (playing) { play(false); play(true); }
  };
  byId("rate").addEventListener("change", () => { if (playing) { play(false); play(true); } });
  byId("scene").addEventListener("change", event => open(Number(event.target.value)));
  button.addEventListener("click", () => play(!playing));
  byId("back").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  slider.addEventListener("input", () => { play(false); now = Number(slider.value) / scene.fps; draw(); });
  open(0);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let begun = false;
  new IntersectionObserver(entries => {
    const seen = entries[entries.length - 1].isIntersecting;
    if (!seen) play(false);
    else if (!begun && !still) { begun = true; play(true); }
  }, { threshold: 0.15 }).observe(films);
};
if (data.scenes.length) player();
