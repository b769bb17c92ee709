// The live page. Each event of /events is the state of the whole cluster as one member sees it. The page
// shows that state and its changes since the previous event. Below it, /v1/keys and /v1/watch show the keys
// with a prefix. Everything from members, and every key and value, is inserted as text, never as HTML.

/** The page's member counts as not answering after this time without an event. */
const SILENT_MS = 1500;
const WATCH_MS = 250;
/** The stream is reopened after this time without an event, or after the shorter one if it failed. */
const REOPEN_MS = 5000;
const RETRY_MS = 1000;
/** How long a dot travels. */
const TRAVEL_MS = 450;
/** The dots for the messages between two events start spread over this time. */
const EVENT_MS = 200;
const DOTS_PER_PAIR = 4;
const DOTS_MAX = 150;
const LINES_MAX = 100;
/** The charts show this time, with a point for each step. A longer pause between two points breaks the line. */
const CHART_MS = 180_000;
const STEP_MS = 1000;
const PAUSE_MS = 3000;
/** The logs' scale covers at least this many entries. */
const ENTRIES_MIN = 20;
const VALUE_SHOWN_MAX = 1000;
const KEY_SHOWN_MAX = 300;
/** Keys of a page of the list, and lines of its recent changes. */
const KEYS_MAX = 100;
const RECENT_MAX = 60;
/** The list is drawn at most this often, each time with this many recent changes, however fast keys change. */
const DRAW_MS = 250;
const DRAWN_MAX = 20;
/** The pause before the keys are listed again after an error, and after a `reset`. */
const LIST_AGAIN_MS = 3000;
const RESET_MS = 1000;

/** The kinds of messages in /events, with their names and shapes. */
const KINDS = {
  append: ["entries", "M4 0A4 4 0 1 1-4 0A4 4 0 1 1 4 0Z"],
  heartbeat: ["heartbeat", "M3 0A3 3 0 1 1-3 0A3 3 0 1 1 3 0Z"],
  vote: ["election", "M0-5.5L5.5 0L0 5.5L-5.5 0Z"],
  snapshot: ["snapshot", "M-4.5-4.5H4.5V4.5H-4.5Z"],
  other: ["forwarded", "M0-4.6L4.6 3.6H-4.6Z"],
};
/** The circle's width, and the centres of its highest and lowest members, for few and many members. */
const WIDTH = 440;
const FEW = { top: 52, bottom: 262, across: 150 };
const MANY = { top: 42, bottom: 296, across: 165 };

const $ = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");
const number = new Intl.NumberFormat("en").format;

/* JSON, with ids above 2^53 as text: a number could not hold them. A quote inside of a text has a backslash. */
const parse = (json) => JSON.parse(json.replace(/(?<!\\)":(\d{16,})(?=[,}\]])/g, '":"$1"'));

function element(name, attributes = {}, text = "") {
  const isSvg = ["svg", "g", "circle", "path", "line", "text"].includes(name);
  const made = isSvg
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

/** Writes only changes: a screen reader would announce the same text again. */
function put(at, text) {
  if (at.textContent !== text) at.textContent = text;
}

const host = (url) => url.replace(/^https?:\/\//, "");

// The state.

let seenBy = 0;
let isBroken = false;
let lastEvent = null;
/** Milliseconds without an event, counting only the time in which this page ran. */
let silence = 0;
let members = [];
/** The last status of each member, kept while it is dead to find the changes when it returns. */
const statuses = new Map();
/** The last statuses of each member, newest first. */
const recentStatuses = new Map();
const RECENT_STATUSES = 8;

/** The role of a member, or why it is not known. */
function stateOf(member) {
  if (isBroken) return member.id === seenBy ? "no answer" : "unknown";
  if (member.alive === false) return member.started ? "dead" : "not started";
  return member.alive && member.status ? member.status.role : "unknown";
}

/** The members with a vote, as the leader has them, or else the member of this page. */
function votersOf(list, leader) {
  const said = leader ?? list.find(({ id }) => id === seenBy);
  const voters = said?.status?.members.filter((peer) => peer.role === "voter").map((peer) => peer.id) ?? [];
  return list.filter(({ id }) => voters.includes(id));
}

/**
 * The status of a member for its row. The members answer at different times, so the newest status of a
 * follower may be ahead of its leader's: then an earlier one is shown, or none if there is none.
 */
function comparable({ id, status }, leader) {
  if (!status || !leader || id === leader.id) return status;
  const led = leader.status;
  const isAhead = ({ term, last, commit, applied }) =>
    term === led.term && (last > led.last || commit > led.commit || applied > led.applied);
  return recentStatuses.get(id)?.find((recent) => !isAhead(recent));
}

/** The leader of the highest term: an older one may not know yet that it was replaced. */
function leaderOf(list) {
  const leaders = list.filter((member) => stateOf(member) === "leader");
  return leaders.sort((a, b) => b.status.term - a.status.term)[0];
}

function receive(cluster) {
  const isFirst = lastEvent === null;
  const wasBroken = isBroken;
  const before = new Map(members.map((member) => [member.id, member]));
  seenBy = cluster.seen_by;
  isBroken = false;
  lastEvent = new Date();
  silence = 0;
  members = cluster.members;
  for (const { id, status } of members) {
    if (status) recentStatuses.set(id, [status, ...(recentStatuses.get(id) ?? [])].slice(0, RECENT_STATUSES));
  }
  if (isFirst) note("Page opened");
  else happenings(before);
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
  if (wasBroken) resumeWatch();
}

// The list of elections and changes.

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
    if (!old) note(`Member ${id} was added at ${host(member.url)}`, "important");
    if (old && old.url !== member.url) note(`Member ${id} was moved to ${host(member.url)}`);
    if (alive === false && old?.alive !== false && member.started) note(`Member ${id} is dead: it does not answer`, "important bad");
    if (alive && old?.alive === false) note(`Member ${id} ${old.started ? "answers again" : "was started"}`, "important");
    const known = statuses.get(id);
    if (!status || !known) continue;
    // A new process counts from 0.
    if (status.uptime_seconds < known.uptime_seconds - 1) note(`Member ${id} was restarted`);
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
    recentStatuses.delete(id);
  }
}

function electionNote(id, status, was) {
  const { role, term } = status;
  const said = {
    leader: `Member ${id} leads in term ${term}`,
    candidate: `Member ${id} requests votes in term ${term}`,
    "pre-candidate": `Member ${id} requests pre-votes after term ${term}`,
    learner: `Member ${id} is a learner`,
  }[role];
  if (said) {
    note(said, role === "leader" ? "important" : "");
  } else if (was === "leader") {
    note(`Member ${id} stepped down in term ${term}`);
  } else if (was === "learner") {
    note(`Member ${id} was promoted to voter`, "important");
  } else {
    return false;
  }
  return true;
}

// The circle.

const nodes = new Map();
const edges = new Map();
/** A pair has one name. `Math.min` would round an id that is text. */
const edgeName = (a, b) => (a < b ? `${a} ${b}` : `${b} ${a}`);

/** Rebuilds the circle when the set of members has changed. */
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
    // The edges of the top node leave downwards, so its labels are beside it.
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
    // Rare kinds first, because they matter most.
    for (const kind of ["vote", "snapshot", "other", "append", "heartbeat"]) {
      const messages = peer.sent[kind] - (sent.get(peer.id)?.[kind] ?? 0);
      if (messages <= 0) continue;
      all += messages;
      const shown = messages < 5 ? 1 : messages < 50 ? 2 : 3;
      for (let dot = 0; dot < shown; dot++) launched.push({ dot, kind, messages });
    }
    // One dot of each kind, then more while there is room.
    launched.sort((a, b) => a.dot - b.dot);
    launched.length = Math.min(launched.length, DOTS_PER_PAIR);
    launched.forEach(({ kind, messages }, place) => launch(from, to, kind, messages, place / launched.length));
    const edge = edges.get(edgeName(id, peer.id));
    // A busy pair has a thicker line, which also shows the traffic if motion is reduced.
    if (all && edge) edge.width = Math.max(edge.width, 1 + Math.min(Math.log10(all), 3));
  }
}

function launch(from, to, kind, messages, delay) {
  // A hidden page does not draw, and would show all dots at once later.
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
      // The two directions use separate lanes.
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

// The members: header, circle, logs, and choices in the forms.

function show(clusterId) {
  const leader = leaderOf(members);
  const living = members.filter((member) => member.alive).length;
  const led = leader ? `Member ${leader.id} leads in term ${leader.status.term}` : "No leader is known";
  // `null`: a member has not answered yet, and may not be dead.
  const isAsking = members.some((member) => member.alive === null);
  const seen = isAsking ? "Asking the members …" : `${led} · ${living} of ${members.length} members alive`;
  put($("summary"), isBroken ? "Not connected" : seen);
  if (clusterId) put($("seen"), `cluster ${clusterId}, seen by member ${seenBy}`);
  const stream = isBroken ? "broken" : "live";
  if ($("stream").dataset.state !== stream) {
    $("stream").dataset.state = stream;
    put($("stream"), stream === "live" ? "live" : "connection lost");
  }
  $("banner").hidden = !isBroken;
  showMajority(leader);
  document.title = leader ? `raftexample: member ${leader.id} leads` : "raftexample: no leader";
  members.forEach(showNode);
  showLogs(leader);
  showChoices($("remove").elements.id);
  showChoices($("lead").elements.id);
}

/** Without a majority nothing can be written, whatever else the page shows. */
function showMajority(leader) {
  const voters = votersOf(members, leader);
  const needed = Math.floor(voters.length / 2) + 1;
  const isQuarantined = ({ status }) => status?.role === "quarantined";
  // A member that has not answered yet may be alive. A quarantined one takes no part.
  const takePart = voters.filter((member) => member.alive !== false && !isQuarantined(member));
  const isLost = !isBroken && voters.length > 0 && takePart.length < needed;
  $("majority").hidden = !isLost;
  if (!isLost) return;
  const named = (list) => list.map(({ id, url }) => `member ${id} at ${host(url)}`).join(", ");
  const dead = voters.filter((member) => member.alive === false);
  const quarantined = voters.filter((member) => member.alive && isQuarantined(member));
  put(
    $("majority"),
    `No majority: ${needed} of ${voters.length} voters must answer, and ${takePart.length} ${takePart.length === 1 ? "does" : "do"}. ` +
      `Until then, writes and linearizable reads fail.${dead.length ? ` Start ${named(dead)}.` : ""}` +
      `${quarantined.length ? ` Quarantined: ${named(quarantined)}.` : ""}`,
  );
}

const GONE = ["dead", "not started", "no answer", "unknown"];

function showNode(member) {
  const { group, number: id, role, facts, place } = nodes.get(member.id);
  const state = stateOf(member);
  const { status } = member;
  group.dataset.id = member.id;
  group.dataset.state = state;
  group.dataset.alive = GONE.includes(state) ? "no" : "yes";
  const known = status ? `term ${status.term} · ${status.vote ? `vote ${status.vote}` : "no vote"}` : state === "not started" ? "learner" : "";
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

/** The scale of all bars. It ends on round numbers, so that the marks move and not the scale. */
function scale() {
  const all = members.filter((member) => member.status).map((member) => member.status);
  const low = Math.min(...all.map((status) => status.first - 1));
  const high = Math.max(...all.map((status) => status.last), low + ENTRIES_MIN);
  const step = nice((high - low) / 4);
  return { low: Math.floor(low / step) * step, high: Math.ceil(high / step) * step };
}

/** The smallest of 1, 2, 2.5, 5, 10, 20, … that is at least `least`. */
function nice(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 2.5, 5, 10].find((step) => step * power >= least * 0.9999) * power;
}

function showLogs(leader) {
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
    const status = comparable(member, leader);
    row.row.dataset.state = state;
    row.row.dataset.alive = GONE.includes(state) ? "no" : "yes";
    put(row.name, String(member.id));
    put(row.state, state === "not started" ? "learner, not started" : state);
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
    // No snapshot yet, or one before the start of all logs.
    row.snapshot.hidden = status.snapshot === 0 || status.snapshot < low;
  }
}

function showChoices(select) {
  const fixed = [...select.options].filter((option) => option.value === "");
  const wanted = members.map((member) => String(member.id));
  const shown = [...select.options].map((option) => option.value).filter(Boolean);
  // Unchanged lists stay as they are: the user may be choosing.
  if (wanted.join() === shown.join()) return;
  const chosen = select.value;
  const options = wanted.map((id) => element("option", { value: id }, id));
  select.replaceChildren(...fixed, ...options);
  if (wanted.includes(chosen)) select.value = chosen;
}

// The charts.

/** What the member counted, a point for each second, oldest first. */
let points = [];
let hasPoints = false;

/** The smallest difference seen between this page's clock and the member's: an event may be handled late. */
let clockOffset = Infinity;

/** Takes the new points of a stream, which begins with all that the member has. */
function addPoints({ now_ms, points: added }) {
  const now = performance.now();
  clockOffset = Math.min(clockOffset, now - now_ms);
  added = added.map((point) => ({ ...point, at: point.at_ms + clockOffset }));
  // A member that was restarted has none of before, but this page has.
  if (!hasPoints) points = points.filter((point) => point.at < added[0].at - STEP_MS / 2);
  hasPoints = true;
  points.push(...added);
  while (points.length && points[0].at < now - CHART_MS - PAUSE_MS) points.shift();
  drawCharts();
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
    const value = (point, kind) => point[kind][this.field];
    const all = points.flatMap((point) => [value(point, "puts") ?? 0, value(point, "gets") ?? 0]);
    const step = nice(Math.max(...all, this.least) / 2);
    const now = points.at(-1)?.at ?? performance.now();
    const x = (at) => right - ((now - at) / CHART_MS) * (right - left);
    const y = (of) => bottom - (of / (2 * step)) * (bottom - top);
    const drawn = [];
    for (const of of [0, step, 2 * step]) {
      drawn.push(element("line", { class: "grid", x1: left, x2: right, y1: y(of), y2: y(of) }));
      drawn.push(element("text", { x: left - 7, y: y(of) + 4, "text-anchor": "end" }, number(of)));
    }
    for (const minutes of [3, 2, 1, 0]) {
      const anchor = minutes === 0 ? "end" : minutes === 3 ? "start" : "middle";
      const label = minutes ? `${minutes} min${width < 340 ? "" : " ago"}` : "now";
      drawn.push(element("text", { x: x(now - minutes * 60000), y: height - 3, "text-anchor": anchor }, label));
    }
    for (const [kind, look] of [["gets", "get"], ["puts", "put"]]) {
      let path = "";
      let isDown = false;
      let before = 0;
      for (const point of points) {
        const of = value(point, kind);
        // Nothing is known of a pause, so it breaks the line.
        if (point.at - before > PAUSE_MS) isDown = false;
        before = point.at;
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
  new Chart($("throughput"), "per_second", 10, (rate) => `${number(Math.round(rate))}/s`),
  new Chart($("latency"), "mean_ms", 1, (delay) => `${delay.toFixed(delay < 10 ? 2 : 0)} ms`),
];
const drawCharts = () => charts.forEach((chart) => chart.draw());

// The forms.

/** Shows the result below a form: status, text, and the entry if there is one. */
function tell(form, isOk, code, text, entry = "") {
  const output = form.querySelector("output");
  output.dataset.ok = isOk ? "yes" : "no";
  output.replaceChildren(...(code ? [element("b", {}, code)] : []), text, ...(entry ? [element("small", {}, entry)] : []));
}

async function ask(form, method, path, body, told) {
  put(form.querySelector("output"), "…");
  try {
    const answer = await fetch(path, { method, body, cache: "no-store" });
    const text = answer.ok ? told(await answer.text()) : await reason(answer);
    const index = answer.headers.get("raft-index");
    const entry = index ? `entry ${number(index)}, term ${answer.headers.get("raft-term")}` : "";
    tell(form, answer.ok, String(answer.status), text, entry);
  } catch {
    tell(form, false, "", "No answer: the outcome is unknown.");
  }
}

/** Why a request failed: the detail of a problem document, or the body. */
async function reason(answer) {
  const text = await answer.text();
  const isProblem = answer.headers.get("content-type") === "application/problem+json";
  return isProblem ? JSON.parse(text).detail : text.trim() || answer.statusText;
}

/** A key as members have it: the characters that a URL cannot hold are percent-encoded. */
function keyOf(text) {
  const encoded = text.replace(/%(?![0-9A-Fa-f]{2})|[^!$-;=?-[\]_a-z~]/gu, encodeURIComponent);
  return encoded.startsWith("/") ? encoded : `/${encoded}`;
}

/** The URL of a key; `null` if the browser would request another one, for example of `/a/../b`. */
function urlOf(key) {
  const target = `/v1/kv${key}`;
  return new URL(target, location.origin).href === location.origin + target ? target : null;
}

function onSubmit(id, act) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    act($(id), Object.fromEntries(new FormData($(id))), event.submitter?.value);
  });
}

function onKey(id, act) {
  onSubmit(id, (form, fields, button) => {
    const key = keyOf(fields.key);
    const url = urlOf(key);
    if (url) act(form, url, key, fields.value, button);
    else tell(form, false, "", `A browser cannot request the key ${clip(key)}`);
  });
}

onKey("put", (form, url, key, value) => {
  ask(form, "PUT", url, value, () => `${clip(key)} = ${clip(value)}`);
});
onKey("get", (form, url, key, _, button) => {
  if (button !== "delete") return ask(form, "GET", url, undefined, (text) => (text ? clip(text) : "(an empty value)"));
  if (confirm(`Delete the key ${clip(key)}?`)) ask(form, "DELETE", url, undefined, () => `${clip(key)} was deleted`);
});
/** How to start a member that was added, as `raftexample member add` prints it. */
function joinCommand(id, url) {
  // A shell may expand the brackets of an IPv6 address.
  const word = (text) => (/[^\w.,:/-]/.test(text) ? `'${text.replaceAll("'", "'\\''")}'` : text);
  const urls = word(members.map((member) => member.url).join());
  const tls = url.startsWith("https:") ? " --peer-cert FILE --peer-key FILE --peer-ca FILE" : "";
  return `raftexample --id ${id} --cluster ${urls} --peer-url ${word(url)}${tls} --port PORT --join`;
}

onSubmit("add", (form, { id, url }) => {
  const command = joinCommand(id, url);
  ask(form, "POST", `/members/${encodeURIComponent(id)}`, url, () => `Member ${id} was added as a learner. Start it now; it gets a vote when it has caught up:\n${command}`);
});
onSubmit("remove", (form, { id }) => {
  if (!confirm(`Remove member ${id} from the cluster? Its id cannot be used again.`)) return;
  ask(form, "DELETE", `/members/${encodeURIComponent(id)}`, undefined, () => `Member ${id} was removed`);
});
onSubmit("lead", (form, { id }) => {
  const to = id && `?to=${encodeURIComponent(id)}`;
  ask(form, "POST", `/transfer-leadership${to}`, undefined, () => (id ? `Member ${id} leads` : "Another member leads"));
});

function clip(text, max = VALUE_SHOWN_MAX) {
  return text.length <= max ? text : `${text.slice(0, max)}… (${number(text.length)} characters)`;
}

// The keys with a prefix: a page of the list, and a watch from the moment that the page shows.

let prefix = "";
/** The page has the keys greater than this one, from the first one if it is empty. */
let after = "";
/** If there are more pages, the last key of this one, else `null`. */
let last = null;
/** The keys of the page in order, each with its value's length and its entry. */
let keys = [];
/** The newest changes that are not drawn yet, and how many older ones were dropped. */
let recent = [];
let dropped = 0;
let listing = null;
let watch = null;
let isWatchDoubtful = false;
let listTimer;
let drawTimer;

function showWatch(state, text) {
  $("watch").dataset.state = state;
  put($("watch"), text);
}

function stopWatching() {
  clearTimeout(listTimer);
  listing?.abort();
  watch?.close();
  listing = watch = null;
}

/** Lists the keys and watches them. A hidden tab does not: browsers allow six connections to a server. */
async function list() {
  stopWatching();
  if (document.hidden) return showWatch("waiting", "paused in a hidden tab");
  showWatch("waiting", "listing");
  const mine = new AbortController();
  listing = mine;
  const query = `prefix=${encodeURIComponent(prefix)}`;
  const page = await load(`/v1/keys?${query}&after=${encodeURIComponent(after)}&limit=${KEYS_MAX}`, mine.signal);
  if (listing !== mine) return;
  listing = null;
  if (!page) return listAgain(LIST_AGAIN_MS);
  keys = page.keys.map(({ key, bytes, etag }) => ({ key, bytes, entry: entryOf(etag) }));
  last = page.next;
  remember({ look: "quiet", text: `listed at entry ${number(page.index)}` });
  watchFrom(`/v1/watch?${query}&from=${encodeURIComponent(page.from)}`);
}

/** The JSON at `url`, or `null` after telling why there is none. */
async function load(url, signal) {
  try {
    const answer = await fetch(url, { cache: "no-store", signal });
    if (answer.ok) return await answer.json();
    const why = await reason(answer);
    if (!signal.aborted) tell($("prefix"), false, String(answer.status), why);
  } catch {
    if (!signal.aborted) tell($("prefix"), false, "", "No answer");
  }
  return null;
}

function listAgain(pause) {
  stopWatching();
  showWatch("broken", `stopped, listing again in ${pause / 1000} s`);
  listTimer = setTimeout(list, pause);
}

function watchFrom(url) {
  const opened = new EventSource(url);
  watch = opened;
  opened.onopen = () => {
    isWatchDoubtful = false;
    showWatch("live", "live");
    put($("prefix").querySelector("output"), "");
  };
  for (const kind of ["put", "delete"]) opened.addEventListener(kind, (event) => changed(kind, event));
  // The member no longer keeps the changes since then. The pause is for a page that is too slow for them.
  opened.addEventListener("reset", () => listAgain(RESET_MS));
  opened.onerror = () => {
    if (opened.readyState === EventSource.CONNECTING) {
      // The browser reconnects, and resumes without a gap.
      isWatchDoubtful = false;
      showWatch("broken", "connection lost, reconnecting");
    } else {
      listAgain(LIST_AGAIN_MS);
      tellWhyRefused(url);
    }
  };
}

/** An `EventSource` does not tell why a member refused it. */
async function tellWhyRefused(url) {
  const mine = new AbortController();
  try {
    const answer = await fetch(url, { cache: "no-store", signal: mine.signal });
    if (!answer.ok) tell($("prefix"), false, String(answer.status), await reason(answer));
  } catch {
    // Listing the keys again will tell.
  }
  mine.abort();
}

/** The member does not answer. The browser may not notice that the connection of the watch is gone. */
function doubtWatch() {
  isWatchDoubtful = watch?.readyState === EventSource.OPEN;
  if (isWatchDoubtful) showWatch("broken", "no answer");
}

/** The member answers again. */
function resumeWatch() {
  if (isWatchDoubtful || !watch) list();
}

/** The entry that an ETag or the id of an event names: `<cluster>-<index>` or `<cluster>-<index>.<position>`. */
const entryOf = (name) => parseInt(name.split("-")[1], 10);

function changed(kind, event) {
  const { key, bytes } = JSON.parse(event.data);
  const entry = entryOf(event.lastEventId);
  if (key > after && (last === null || key <= last)) {
    const place = placeOf(key);
    const isThere = keys[place]?.key === key;
    if (kind === "delete") keys.splice(place, isThere ? 1 : 0);
    else keys.splice(place, isThere ? 1 : 0, { key, bytes, entry });
    if (keys.length > KEYS_MAX) {
      keys.pop();
      last = keys.at(-1).key;
    }
  }
  remember({ look: kind, kind, text: key, entry });
}

/** The place of the first key of the page that is not less than `key`. */
function placeOf(key) {
  let [low, high] = [0, keys.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (keys[middle].key < key) low = middle + 1;
    else high = middle;
  }
  return low;
}

function remember(change) {
  recent.push({ ...change, at: new Date() });
  if (recent.length > DRAWN_MAX) {
    recent.shift();
    dropped += 1;
  }
  drawTimer ??= setTimeout(draw, DRAW_MS);
}

function draw() {
  drawTimer = undefined;
  drawKeys();
  drawRecent();
  // All keys of this page were deleted.
  if (!keys.length && last !== null && watch) list();
}

function drawKeys() {
  keys.forEach((shown, place) => {
    const row = $("found").children[place] ?? $("found").appendChild(keyRow());
    const [key, bytes, entry] = row.children;
    put(key, clip(shown.key, KEY_SHOWN_MAX));
    put(bytes, number(shown.bytes));
    put(entry, number(shown.entry));
  });
  while ($("found").children.length > keys.length) $("found").lastChild.remove();
  const count = keys.length === 1 ? "1 key" : `${number(keys.length)} keys`;
  put($("listed-count"), `${count}${after && " on this page"}${last === null ? "" : ", more follow"}`);
  $("first-page").hidden = !after;
  $("next-page").hidden = last === null;
}

function keyRow() {
  const row = element("tr");
  row.append(element("th", { scope: "row" }), element("td"), element("td"));
  return row;
}

function drawRecent() {
  const lines = recent.map(({ look, kind, text, entry, at }) => {
    const line = element("li", { class: look });
    line.append(element("time", { datetime: at.toISOString() }, at.toLocaleTimeString("en-GB")));
    if (kind) line.append(element("b", {}, kind));
    line.append(element("span", entry ? { title: `entry ${number(entry)}` } : {}, clip(text, KEY_SHOWN_MAX)));
    return line;
  });
  if (dropped) lines.unshift(element("li", { class: "quiet" }, `${number(dropped)} more changes`));
  $("recent").prepend(...lines.reverse());
  while ($("recent").children.length > RECENT_MAX) $("recent").lastChild.remove();
  recent = [];
  dropped = 0;
}

/** Empties the list and its changes: they are of another prefix. */
function forget() {
  clearTimeout(drawTimer);
  drawTimer = undefined;
  [keys, last, recent, dropped] = [[], null, [], 0];
  drawKeys();
  put($("listed-count"), "");
  $("recent").replaceChildren();
}

function showPage(key) {
  after = key;
  list();
  $("listed").scrollTop = 0;
  // The button that was pressed may be gone on that page.
  $("listed").focus();
}

onSubmit("prefix", (form, fields) => {
  prefix = fields.prefix && keyOf(fields.prefix);
  after = "";
  put(form.querySelector("output"), "");
  forget();
  list();
});
$("first-page").addEventListener("click", () => showPage(""));
$("next-page").addEventListener("click", () => showPage(last));
document.addEventListener("visibilitychange", list);

// The stream.

let source;

function connect() {
  source?.close();
  source = new EventSource("/events");
  hasPoints = false;
  clockOffset = Infinity;
  source.onmessage = (event) => receive(parse(event.data));
  source.addEventListener("points", (event) => addPoints(JSON.parse(event.data)));
  // Browsers reconnect after some errors only, so the page always does it.
  source.onerror = () => {
    source.close();
    broken();
    silence = REOPEN_MS - RETRY_MS;
  };
}

/** Links to the pages of the members that were not dead. Their addresses come from them. */
function pagesOfOthers() {
  const links = [];
  for (const { id, alive, status } of members) {
    const url = status?.admin_url ?? "";
    if (id === seenBy || alive === false || !/^https?:\/\//.test(url)) continue;
    if (links.length) links.push(", ");
    links.push(element("a", { href: url }, `member ${id} at ${host(url)}`));
  }
  return links;
}

function broken() {
  if (isBroken) return;
  isBroken = true;
  const who = seenBy ? `Member ${seenBy}` : "The member";
  const since = lastEvent === null ? "" : ` The page shows the state of ${lastEvent.toLocaleTimeString("en-GB")}.`;
  put($("banner"), `${who} at ${location.host}, which serves this page, does not answer.${since} Reconnecting.`);
  const others = pagesOfOthers();
  if (others.length) $("banner").append(" Pages of other members: ", ...others, ".");
  if (seenBy) note(`Member ${seenBy}, which serves this page, does not answer`, "important bad");
  doubtWatch();
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
// A paused member, or one whose machine is gone, does not close the connection. The silence is counted
// rather than computed from the time, because the page itself may stop, for example while it asks for
// a confirmation.
setInterval(() => {
  silence += WATCH_MS;
  if (silence > SILENT_MS) broken();
  if (silence < REOPEN_MS) return;
  silence = 0;
  connect();
}, WATCH_MS);
connect();
list();
