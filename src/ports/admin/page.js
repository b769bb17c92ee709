// The live page: each event of /events is the whole cluster as one member sees it, and everything
// shown is that, or what changed since the event before. What members say is only ever put in as
// text.

/** Without an event for so long, the member whose page this is does not answer. */
const SILENT_MS = 1500;
const WATCH_MS = 250;
/** Without one for so long, the stream is opened again; after an error, sooner. */
const REOPEN_MS = 5000;
const RETRY_MS = 1000;
/** How long a message is under way on the page. */
const TRAVEL_MS = 450;
/** What is sent between two events leaves spread over so long. */
const EVENT_MS = 200;
const DOTS_PER_PAIR = 4;
const DOTS_MAX = 150;
const LINES_MAX = 100;
/** Requests are counted in steps of so long, and shown for so many of them. */
const STEP_MS = 1000;
const STEPS = 180;
/** A log this short is drawn with this many entries' room. */
const ENTRIES_MIN = 20;
const VALUE_SHOWN_MAX = 1000;

/** The kinds of messages, as /events counts them, and their shapes. */
const KINDS = {
  append: ["entries", "M4 0A4 4 0 1 1-4 0A4 4 0 1 1 4 0Z"],
  heartbeat: ["heartbeat", "M3 0A3 3 0 1 1-3 0A3 3 0 1 1 3 0Z"],
  vote: ["election", "M0-5.5L5.5 0L0 5.5L-5.5 0Z"],
  snapshot: ["snapshot", "M-4.5-4.5H4.5V4.5H-4.5Z"],
  other: ["forwarded", "M0-4.6L4.6 3.6H-4.6Z"],
};
/** The circle's width, and the middles of its topmost and lowest members; many leave each less room. */
const WIDTH = 440;
const FEW = { top: 52, bottom: 262, across: 150 };
const MANY = { top: 42, bottom: 296, across: 165 };

const $ = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");
const number = new Intl.NumberFormat("en").format;

function element(name, attributes = {}, text = "") {
  const isSvg = ["svg", "g", "circle", "path", "line", "text"].includes(name);
  const made = isSvg
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

/** Writes only what differs, so that nothing is announced or drawn twice. */
function put(at, text) {
  if (at.textContent !== text) at.textContent = text;
}

const host = (url) => url.replace(/^https?:\/\//, "");

// What is known.

let seenBy = 0;
let isBroken = false;
let lastEvent = null;
/** Milliseconds without an event in which this page was awake. */
let silence = 0;
let members = [];
/** The last status of each member: a dead one may come back and tell only then what changed. */
const statuses = new Map();

/** What a member is, in a word: its role, or why none is known. */
function stateOf(member) {
  if (isBroken) return member.id === seenBy ? "no answer" : "unknown";
  if (member.alive === false) return "dead";
  return member.alive && member.status ? member.status.role : "unknown";
}

/** A deposed leader that does not know it yet has an older term. */
function leaderOf(list) {
  const leaders = list.filter((member) => stateOf(member) === "leader");
  return leaders.sort((a, b) => b.status.term - a.status.term)[0];
}

function receive(cluster) {
  const isFirst = lastEvent === null;
  const before = new Map(members.map((member) => [member.id, member]));
  seenBy = cluster.seen_by;
  isBroken = false;
  lastEvent = new Date();
  silence = 0;
  members = cluster.members;
  if (isFirst) note("This page was opened");
  else happenings(before);
  count();
  layOut(before);
  for (const edge of edges.values()) edge.width = Math.max(1, edge.width * 0.8);
  for (const member of members) {
    if (!member.status) continue;
    const known = statuses.get(member.id);
    if (known) sendDots(member.id, known, member.status);
    statuses.set(member.id, member.status);
  }
  for (const { line, width } of edges.values()) line.style.strokeWidth = `${width.toFixed(1)}px`;
  show(cluster.cluster_id);
}

// What happened: the list.

function note(text, look = "") {
  const line = element("li");
  const now = new Date();
  const time = element("time", { datetime: now.toISOString() }, now.toLocaleTimeString("en-GB"));
  line.append(time, element("span", look && { class: look }, text));
  $("happened").prepend(line);
  while ($("happened").children.length > LINES_MAX) $("happened").lastChild.remove();
}

function happenings(before) {
  for (const member of members) {
    const { id, alive, status } = member;
    const old = before.get(id);
    if (!old) note(`Member ${id} was added, at ${host(member.url)}`, "important");
    if (old && old.url !== member.url) note(`Member ${id} listens at ${host(member.url)} now`);
    if (alive === false && old?.alive !== false) note(`Member ${id} is dead: it does not answer`, "important bad");
    if (alive && old?.alive === false) note(`Member ${id} answers again`, "important");
    const known = statuses.get(id);
    if (!status || !known) continue;
    // Counts and times begin anew in a new process.
    if (status.uptime_seconds < known.uptime_seconds - 1) note(`Member ${id} was started again`);
    const isElection = status.role !== known.role && electionNote(id, status, known.role);
    if (!isElection && status.term !== known.term) {
      const voted = status.vote && status.vote !== id ? `votes for member ${status.vote}` : "is";
      note(`Member ${id} ${voted} in term ${status.term}`);
    } else if (!isElection && status.vote !== known.vote && status.vote) {
      note(`Member ${id} votes for member ${status.vote} in term ${status.term}`);
    }
    if (status.role !== known.role || status.term !== known.term) flash(id);
  }
  const ids = new Set(members.map((member) => member.id));
  for (const id of before.keys()) {
    if (ids.has(id)) continue;
    note(`Member ${id} was removed`, "important");
    statuses.delete(id);
  }
}

function electionNote(id, status, was) {
  const { role, term } = status;
  const said = {
    leader: `Member ${id} leads in term ${term}`,
    candidate: `Member ${id} asks for votes in term ${term}`,
    "pre-candidate": `Member ${id} asks whether it would be elected after term ${term}`,
    learner: `Member ${id} is a learner`,
  }[role];
  if (said) {
    note(said, role === "leader" ? "important" : "");
  } else if (was === "leader") {
    note(`Member ${id} leads no more; its term is ${term}`);
  } else if (was === "learner") {
    note(`Member ${id} has a vote now`, "important");
  } else {
    return false;
  }
  return true;
}

// The circle.

const nodes = new Map();
const edges = new Map();
const edgeName = (a, b) => `${Math.min(a, b)} ${Math.max(a, b)}`;

/** Makes the nodes anew when members came or went. */
function layOut(before) {
  if (nodes.size && before.size === members.length && members.every(({ id }) => before.has(id))) return;
  for (const name of ["nodes", "edges", "dots"]) $(name).replaceChildren();
  nodes.clear();
  edges.clear();
  dots.length = 0;
  const size = members.length;
  const isFew = size <= 5;
  const radius = size <= 4 ? 42 : isFew ? 37 : 30;
  const { top, bottom, across } = isFew ? FEW : MANY;
  const angles = members.map((_, place) => ((place / size) * 2 - 0.5) * Math.PI);
  const lowest = Math.max(...angles.map(Math.sin));
  members.forEach(({ id }, place) => {
    const x = WIDTH / 2 + across * Math.cos(angles[place]);
    const depth = size === 1 ? 0.4 : (Math.sin(angles[place]) + 1) / (lowest + 1);
    const y = top + depth * (bottom - top);
    const group = element("g", { class: "node", role: "img", transform: `translate(${x} ${y})` });
    const text = (look, dx, dy) => element("text", { class: look, x: dx, y: dy });
    const parts = {
      group, x, y, radius,
      number: text("number", 0, -1),
      role: text("role", 0, 15),
      facts: text("facts", 0, radius + 18),
      place: text("place", 0, radius + 33),
    };
    // Where edges leave downwards, what belongs to the node stands beside it.
    if (size > 1 && place === 0) {
      for (const [part, dy] of [[parts.facts, -2], [parts.place, 14]]) {
        part.setAttribute("x", radius + 12);
        part.setAttribute("y", dy);
        part.classList.add("beside");
      }
    }
    parts.ring = element("circle", { r: radius });
    const halo = element("circle", { class: "halo", r: radius + 5 });
    group.append(halo, parts.ring, parts.number, parts.role, parts.facts, ...(isFew ? [parts.place] : []));
    nodes.set(id, parts);
    $("nodes").append(group);
  });
  for (const a of nodes.keys()) {
    for (const b of nodes.keys()) {
      if (a >= b) continue;
      const [from, to] = [nodes.get(a), nodes.get(b)];
      const line = element("line", { class: "edge", x1: from.x, y1: from.y, x2: to.x, y2: to.y });
      edges.set(edgeName(a, b), { line, width: 1 });
      $("edges").append(line);
    }
  }
}

function flash(id) {
  const ring = nodes.get(id)?.ring;
  if (!ring || still.matches) return;
  const wide = { strokeWidth: "16px", strokeOpacity: 0.5 };
  ring.animate([wide, { strokeWidth: "1.5px", strokeOpacity: 1 }], { duration: 900, easing: "ease-out" });
}

// Messages: dots that travel from member to member.

const dots = [];

function sendDots(id, known, status) {
  const sent = new Map(known.members.map((peer) => [peer.id, peer.sent]));
  for (const peer of status.members) {
    const [from, to] = [nodes.get(id), nodes.get(peer.id)];
    if (!from || !to || from === to) continue;
    const launched = [];
    let all = 0;
    // Rare ones first: they are what one wants to see.
    for (const kind of ["vote", "snapshot", "other", "append", "heartbeat"]) {
      const messages = peer.sent[kind] - (sent.get(peer.id)?.[kind] ?? 0);
      if (messages <= 0) continue;
      all += messages;
      const shown = messages < 5 ? 1 : messages < 50 ? 2 : 3;
      for (let dot = 0; dot < shown; dot++) launched.push({ dot, kind, messages });
    }
    // One of each kind, then the rest while there is room.
    launched.sort((a, b) => a.dot - b.dot);
    launched.length = Math.min(launched.length, DOTS_PER_PAIR);
    launched.forEach(({ kind, messages }, place) => launch(from, to, kind, messages, place / launched.length));
    const edge = edges.get(edgeName(id, peer.id));
    // A busy pair has a thicker line, which also says so where nothing moves.
    if (all && edge) edge.width = Math.max(edge.width, 1 + Math.min(Math.log10(all), 3));
  }
}

function launch(from, to, kind, messages, delay) {
  // Hidden pages draw nothing, and would have it all at once when they are seen again.
  if (still.matches || document.hidden || dots.length >= DOTS_MAX) return;
  const scale = 0.8 + Math.min(Math.log10(messages), 3) * 0.22;
  const shape = element("path", { class: `kind-${kind}`, d: KINDS[kind][1], visibility: "hidden" });
  $("dots").append(shape);
  dots.push({ shape, from, to, scale, start: performance.now() + delay * EVENT_MS });
  if (dots.length === 1) requestAnimationFrame(moveDots);
}

function moveDots(now) {
  for (let place = dots.length - 1; place >= 0; place--) {
    const { shape, from, to, scale, start } = dots[place];
    const done = (now - start) / TRAVEL_MS;
    if (done >= 1) {
      shape.remove();
      dots.splice(place, 1);
    } else if (done >= 0) {
      // The two directions keep apart, like lanes.
      const [dx, dy] = [to.x - from.x, to.y - from.y];
      const bend = Math.sin(done * Math.PI) * 9 / Math.hypot(dx, dy);
      const x = from.x + dx * done - dy * bend;
      const y = from.y + dy * done + dx * bend;
      shape.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)}) scale(${scale})`);
      shape.setAttribute("visibility", "visible");
    }
  }
  if (dots.length) requestAnimationFrame(moveDots);
}

// What is shown of the members: header, circle, logs, choices in the forms.

function show(clusterId) {
  const leader = leaderOf(members);
  const living = members.filter((member) => member.alive).length;
  const led = leader ? `Member ${leader.id} leads in term ${leader.status.term}` : "No leader is known";
  // Before all have answered for the first time nobody knows.
  const isAsking = members.some((member) => member.alive === null);
  const seen = isAsking ? "Asking the members …" : `${led} · ${living} of ${members.length} members alive`;
  put($("summary"), isBroken ? "No news" : seen);
  if (clusterId) put($("seen"), `cluster ${clusterId}, as member ${seenBy} sees it`);
  const stream = isBroken ? "broken" : "live";
  if ($("stream").dataset.state !== stream) {
    $("stream").dataset.state = stream;
    put($("stream"), stream === "live" ? "live" : "connection lost");
  }
  $("banner").hidden = !isBroken;
  document.title = leader ? `raftexample: member ${leader.id} leads` : "raftexample: no leader";
  members.forEach(showNode);
  showLogs();
  showChoices($("remove").elements.id);
  showChoices($("lead").elements.id);
}

function showNode(member) {
  const { group, number: id, role, facts, place } = nodes.get(member.id);
  const state = stateOf(member);
  const { status } = member;
  group.dataset.id = member.id;
  group.dataset.state = state;
  group.dataset.alive = ["dead", "no answer", "unknown"].includes(state) ? "no" : "yes";
  const known = status ? `term ${status.term} · ${status.vote ? `vote ${status.vote}` : "no vote"}` : "";
  put(id, String(member.id));
  put(role, state);
  put(facts, known);
  put(place, host(member.url));
  const label = `Member ${member.id}, ${state}${known && `, ${known}`}, ${host(member.url)}`;
  if (group.getAttribute("aria-label") !== label) group.setAttribute("aria-label", label);
}

const rows = new Map();

function rowOf(id) {
  if (rows.has(id)) return rows.get(id);
  const row = { row: element("tr"), head: element("th", { scope: "row" }), track: element("div", { class: "track", "aria-hidden": "true" }) };
  const bar = element("td", { class: "bar" });
  bar.append(row.track);
  for (const look of ["rail", "span uncommitted", "span committed", "span applied", "mark snapshot", "mark commit", "mark apply"]) {
    row[look.split(" ").pop()] = row.track.appendChild(element("div", { class: look }));
  }
  row.name = element("b");
  row.state = element("span");
  row.head.append(row.name, row.state);
  row.cells = ["snapshot", "applied", "commit", "last"].map((name) => [name, element("td")]);
  row.row.append(row.head, bar, ...row.cells.map(([, cell]) => cell));
  rows.set(id, row);
  return row;
}

/** All bars have one scale, which ends on round numbers: marks move along it, and it stays a while. */
function scale() {
  const all = members.filter((member) => member.status).map((member) => member.status);
  const low = Math.min(...all.map((status) => status.first - 1));
  const high = Math.max(...all.map((status) => status.last), low + ENTRIES_MIN);
  const step = nice((high - low) / 4);
  return { low: Math.floor(low / step) * step, high: Math.ceil(high / step) * step };
}

/** The least of 1, 2, 2.5, 5, 10, … that is not below. */
function nice(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 2.5, 5, 10].find((step) => step * power >= least * 0.9999) * power;
}

function showLogs() {
  const wanted = members.map((member) => rowOf(member.id).row);
  const shown = [...$("rows").children];
  if (wanted.length !== shown.length || wanted.some((row, place) => row !== shown[place])) {
    $("rows").replaceChildren(...wanted);
  }
  const { low, high } = scale();
  const known = Number.isFinite(low);
  put($("scale-low"), known ? number(low) : "");
  put($("scale-high"), known ? number(high) : "");
  const percent = (index) => `${(Math.min(Math.max((index - low) / (high - low), 0), 1) * 100).toFixed(2)}%`;
  for (const member of members) {
    const row = rowOf(member.id);
    const state = stateOf(member);
    const { status } = member;
    row.row.dataset.state = state;
    row.row.dataset.alive = ["dead", "no answer", "unknown"].includes(state) ? "no" : "yes";
    put(row.name, String(member.id));
    put(row.state, state);
    row.head.title = host(member.url);
    row.track.style.visibility = status ? "visible" : "hidden";
    for (const [name, cell] of row.cells) put(cell, status?.[name] ? number(status[name]) : "–");
    if (!status) continue;
    for (const [name, end] of [["uncommitted", "last"], ["committed", "commit"], ["applied", "applied"]]) {
      row[name].style.left = percent(status.first - 1);
      row[name].style.width = `calc(${percent(status[end])} - ${percent(status.first - 1)})`;
    }
    for (const [mark, at] of [["snapshot", "snapshot"], ["commit", "commit"], ["apply", "applied"]]) {
      row[mark].style.left = percent(status[at]);
    }
    // None was made yet, or it lies before all logs.
    row.snapshot.hidden = status.snapshot === 0 || status.snapshot < low;
  }
}

function showChoices(select) {
  const fixed = [...select.options].filter((option) => option.value === "");
  const wanted = members.map((member) => String(member.id));
  const shown = [...select.options].map((option) => option.value).filter(Boolean);
  // Not touched without need: somebody may be choosing.
  if (wanted.join() === shown.join()) return;
  const chosen = select.value;
  const options = wanted.map((id) => element("option", { value: id }, id));
  select.replaceChildren(...fixed, ...options);
  if (wanted.includes(chosen)) select.value = chosen;
}

// The charts.

/** One point per step: requests per second and mean milliseconds of each kind, `null` without any. */
const points = [];
let step = null;

function totals() {
  const all = new Map();
  for (const { id, status } of members) {
    const { puts, gets } = status ?? statuses.get(id) ?? {};
    if (puts) all.set(id, { puts, gets });
  }
  return all;
}

function count() {
  const now = performance.now();
  const elapsed = step ? now - step.start : 0;
  if (step && elapsed < STEP_MS) return;
  const all = totals();
  // Over a gap nothing is known: the line breaks.
  if (step && elapsed > 3 * STEP_MS) points.push({ at: now, gap: true });
  else if (step) points.push({ at: now, ...measured("puts", all, elapsed), ...measured("gets", all, elapsed) });
  while (points.length && points[0].at < now - (STEPS + 1) * STEP_MS) points.shift();
  step = { start: now, all };
  drawCharts();
}

function measured(kind, all, elapsed) {
  let [requests, micros] = [0, 0];
  for (const [id, counts] of all) {
    const before = step.all.get(id)?.[kind];
    if (!before) continue;
    // A count that went down began anew: the member was started again.
    const isNew = counts[kind].count < before.count;
    requests += counts[kind].count - (isNew ? 0 : before.count);
    micros += counts[kind].micros - (isNew ? 0 : before.micros);
  }
  return { [`${kind}Rate`]: (requests * 1000) / elapsed, [`${kind}Delay`]: requests ? micros / requests / 1000 : null };
}

class Chart {
  constructor(figure, field, least, format) {
    Object.assign(this, { svg: figure.lastElementChild, field, least, format });
    this.values = {};
    for (const [kind, name, look] of [["puts", "PUT", "put"], ["gets", "GET", "get"]]) {
      const series = element("span", { class: "series" });
      const sample = element("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" });
      sample.append(element("path", { class: `curve ${look}`, d: "M1 4H21" }));
      this.values[kind] = element("b", {}, "–");
      series.append(sample, name, this.values[kind]);
      figure.firstElementChild.append(series);
    }
  }

  draw() {
    const [width, height] = [this.svg.clientWidth, this.svg.clientHeight];
    if (!width) return;
    const [left, top, right, bottom] = [44, 6, width - 8, height - 17];
    const value = (point, kind) => (point.gap ? null : point[kind + this.field]);
    const all = points.flatMap((point) => [value(point, "puts") ?? 0, value(point, "gets") ?? 0]);
    const step = nice(Math.max(...all, this.least) / 2);
    const now = points.at(-1)?.at ?? performance.now();
    const x = (at) => right - ((now - at) / (STEPS * STEP_MS)) * (right - left);
    const y = (of) => bottom - (of / (2 * step)) * (bottom - top);
    const drawn = [];
    for (const of of [0, step, 2 * step]) {
      drawn.push(element("line", { class: "grid", x1: left, x2: right, y1: y(of), y2: y(of) }));
      drawn.push(element("text", { x: left - 7, y: y(of) + 4, "text-anchor": "end" }, number(of)));
    }
    for (const minutes of [3, 2, 1, 0]) {
      const anchor = minutes === 0 ? "end" : minutes === 3 ? "start" : "middle";
      const label = minutes ? `${minutes} min ago` : "now";
      drawn.push(element("text", { x: x(now - minutes * 60000), y: height - 3, "text-anchor": anchor }, label));
    }
    for (const [kind, look] of [["gets", "get"], ["puts", "put"]]) {
      let path = "";
      let isDown = false;
      for (const point of points) {
        const of = value(point, kind);
        // A point without a neighbour is a dot: its line has no length, and round ends.
        if (of !== null && x(point.at) >= left - 1) path += `${isDown ? "L" : "M"}${x(point.at).toFixed(1)} ${y(of).toFixed(1)}${isDown ? "" : "h0"}`;
        isDown = of !== null;
      }
      drawn.push(element("path", { class: `curve ${look}`, d: path }));
      const latest = points.length ? value(points.at(-1), kind) : null;
      put(this.values[kind], latest === null ? "–" : this.format(latest));
    }
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren(...drawn);
  }
}

const charts = [
  new Chart($("throughput"), "Rate", 10, (rate) => `${number(Math.round(rate))}/s`),
  new Chart($("latency"), "Delay", 1, (delay) => `${delay.toFixed(delay < 10 ? 2 : 0)} ms`),
];
const drawCharts = () => charts.forEach((chart) => chart.draw());

// The forms.

/** Shows beside a form what became of it: a status, what that means, and the entry if there is one. */
function tell(form, isOk, code, text, entry = "") {
  const output = form.querySelector("output");
  output.dataset.ok = isOk ? "yes" : "no";
  output.replaceChildren(...(code ? [element("b", {}, code)] : []), text, ...(entry ? [element("small", {}, entry)] : []));
}

async function ask(form, method, path, body, told) {
  put(form.querySelector("output"), "…");
  try {
    const answer = await fetch(path, { method, body, cache: "no-store" });
    const text = await answer.text();
    const index = answer.headers.get("raft-index");
    const entry = index ? `entry ${number(index)}, term ${answer.headers.get("raft-term")}` : "";
    tell(form, answer.ok, String(answer.status), answer.ok ? told(text) : text.trim() || answer.statusText, entry);
  } catch {
    tell(form, false, "", "No answer. Whether it was done is not known.");
  }
}

/** The request target of a key; `null` for one that browsers change before they send it. */
function target(key) {
  const parts = key.replace(/^\//, "").split("/");
  if (parts.some((part) => part === "." || part === "..")) return null;
  return `/kv/${parts.map(encodeURIComponent).join("/")}`;
}

const NO_TARGET = "A browser cannot send a key with a part that is . or ..";

function onSubmit(id, act) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    act($(id), Object.fromEntries(new FormData($(id))));
  });
}

onSubmit("put", (form, { key, value }) => {
  const path = target(key);
  if (!path) return tell(form, false, "", NO_TARGET);
  ask(form, "PUT", path, value, () => `${key} = ${clip(value)}`);
});
onSubmit("get", (form, { key }) => {
  const path = target(key);
  if (!path) return tell(form, false, "", NO_TARGET);
  ask(form, "GET", path, undefined, (text) => (text ? clip(text) : "(an empty value)"));
});
onSubmit("add", (form, { id, url }) => {
  ask(form, "POST", `/members/${encodeURIComponent(id)}`, url, () => `Member ${id} is one now: start it with --join`);
});
onSubmit("remove", (form, { id }) => {
  if (!confirm(`Remove member ${id} from the cluster? Its id is never used again.`)) return;
  ask(form, "DELETE", `/members/${encodeURIComponent(id)}`, undefined, () => `Member ${id} was removed`);
});
onSubmit("lead", (form, { id }) => {
  const to = id && `?to=${encodeURIComponent(id)}`;
  ask(form, "POST", `/transfer-leadership${to}`, undefined, () => (id ? `Member ${id} leads` : "Another member leads"));
});

function clip(text) {
  return text.length <= VALUE_SHOWN_MAX ? text : `${text.slice(0, VALUE_SHOWN_MAX)}… (${number(text.length)} characters)`;
}

// The stream.

let source;

function connect() {
  source?.close();
  source = new EventSource("/events");
  source.onmessage = (event) => receive(JSON.parse(event.data));
  // A browser tries again by itself, but not after every error; so the page does.
  source.onerror = () => {
    source.close();
    broken();
    silence = REOPEN_MS - RETRY_MS;
  };
}

function broken() {
  if (isBroken) return;
  isBroken = true;
  const who = seenBy ? `Member ${seenBy}` : "The member";
  const since = lastEvent === null ? "" : ` What is shown is as of ${lastEvent.toLocaleTimeString("en-GB")}.`;
  put($("banner"), `${who} at ${location.host}, whose page this is, does not answer.${since} Trying again.`);
  if (seenBy) note(`Member ${seenBy}, whose page this is, does not answer`, "important bad");
  show();
}

for (const [kind, [name, shape]] of Object.entries(KINDS)) {
  const sample = element("svg", { viewBox: "-6 -6 12 12", "aria-hidden": "true" });
  sample.append(element("path", { class: `kind-${kind}`, d: shape }));
  const item = element("li");
  item.append(sample, name);
  $("kinds").append(item);
}
new ResizeObserver(drawCharts).observe($("throughput"));
// A member that was paused, or whose machine is gone, closes no connection. Not a difference of times:
// this page may have been asleep itself, as it is while it asks for a confirmation.
setInterval(() => {
  silence += WATCH_MS;
  if (silence > SILENT_MS) broken();
  if (silence < REOPEN_MS) return;
  silence = 0;
  connect();
}, WATCH_MS);
connect();
