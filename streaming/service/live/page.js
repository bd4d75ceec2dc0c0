"use strict";
(() => {
  const words = JSON.parse(document.documentElement.dataset.words);
  const language = document.documentElement.lang;
  const FRAMES_KEPT = 150;
  const SPAN_S = 300;
  const EVERY_MS = 2000;
  const ANSWER_MS_MAX = 5000;
  // between frames further apart nobody watched: the line has a gap
  const GAP_S = 8;
  const QUANTILES = { p50: "p50_ms", p99: "p99_ms", "p99.9": "p999_ms" };
  let frames = [];
  let newest = 0;

  // --- words and figures: an unknown figure is –, never 0

  const translate = (name, filled = {}) =>
    Object.entries(filled).reduce((text, [key, value]) => text.replace(`{${key}}`, value), words[name] ?? name);
  const known = (value) => typeof value === "number" && Number.isFinite(value);
  const number = (value) => {
    if (!known(value)) return "–";
    const digits = Math.abs(value) >= 100 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 3 };
    return value.toLocaleString(language, digits);
  };
  const percent = (share) => (known(share) ? `${number(100 * share)} %` : "–");
  const span = (seconds) =>
    seconds < 90 ? translate("seconds", { n: Math.round(seconds) }) : translate("minutes", { n: number(Math.round(seconds / 6) / 10) });
  const over = (value, limit) => known(value) && known(limit) && value > limit;

  // --- elements

  const made = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const place = (id, ...children) => document.getElementById(id).replaceChildren(...children);

  const tile = (value, unit, text, kind) => {
    const card = made("div", undefined, "tile");
    const figure = made("b", value);
    if (unit) figure.append(" ", made("small", unit));
    card.append(figure, made("span", text));
    if (kind) card.append(" ", made("span", translate(kind), `kind ${kind}`));
    return card;
  };
  // a tile for each kind of joules; without any, a tile with the reason
  const tiles = (figures, unit, text, absent) => {
    const kinds = Object.keys(figures).sort();
    if (!kinds.length) return [tile("–", unit, `${text} · ${absent}`)];
    return kinds.map((kind) => tile(number(figures[kind]), unit, text, kind));
  };

  const headed = (text, scope) => {
    const cell = made("th", text);
    cell.scope = scope;
    return cell;
  };
  const table = (heads, rows) => {
    const head = made("thead");
    head.append(made("tr"));
    head.firstChild.append(...heads.map((text) => headed(text, "col")));
    const body = made("tbody");
    for (const [name, ...cells] of rows) {
      const row = made("tr");
      row.append(headed(name, "row"), ...cells.map((cell) => (cell instanceof Node ? cell : made("td", cell))));
      body.append(row);
    }
    const whole = made("table");
    whole.append(head, body);
    return whole;
  };

  // --- a plot of the last five minutes: from 0 up, the limit dashed

  const drawn = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const outline = (points, x, y) => {
    let path = "";
    points.forEach(([at_s, value], index) => {
      const here = `${x(at_s).toFixed(1)} ${y(value).toFixed(1)}`;
      const apart = index === 0 || at_s - points[index - 1][0] > GAP_S;
      // a line to the same point is a dot, so that a single point is visible
      path += apart ? `M${here}L${here}` : `L${here}`;
    });
    return path;
  };
  const plot = (text, pick, show, { kind, limit } = {}) => {
    const end_s = frames.length ? frames[frames.length - 1].at_s : 0;
    const points = frames
      .map((frame) => [frame.at_s, pick(frame)])
      .filter(([at_s, value]) => known(value) && end_s - at_s <= SPAN_S);
    const last = frames.length ? show(pick(frames[frames.length - 1])) : "–";
    const top = Math.max(0, ...points.map(([, value]) => value));
    const highest = Math.max(top, known(limit) ? limit : 0) || 1;
    const x = (at_s) => 300 * (1 - (end_s - at_s) / SPAN_S);
    const y = (value) => 58 - (56 * value) / highest;
    const scale = [points.length ? translate("most", { value: show(top) }) : translate("no_data")];
    if (known(limit)) scale.push(translate("dashed", { value: show(limit) }));

    const caption = made("figcaption");
    const title = made("span", text);
    if (kind) title.append(" ", made("span", translate(kind), `kind ${kind}`));
    caption.append(title, made("b", last));
    const label = [kind ? `${text}, ${translate(kind)}` : text, last, ...scale].join("; ");
    const svg = drawn("svg", { viewBox: "0 0 300 60", preserveAspectRatio: "none", role: "img", "aria-label": label });
    if (known(limit)) svg.append(drawn("line", { x1: 0, x2: 300, y1: y(limit), y2: y(limit) }));
    if (points.length) svg.append(drawn("path", { d: outline(points, x, y) }));
    const line = made("div", undefined, "scale");
    line.append(made("span", translate("ago")), made("span", scale.join(" · ")), made("span", translate("now")));
    const figure = made("figure");
    figure.append(caption, svg, line);
    return figure;
  };

  // --- the page's parts

  const pathOf = (frame, name) => frame.paths.find((frame) => frame.path === name);
  const limitOf = (frame, quantile, path) => frame.limits_ms[`${quantile} of ${path}`];
  const objectiveText = (frame, name) => {
    const [quantile, path] = name.split(" of ");
    if (path === undefined) return translate("degraded_at_most", { limit: percent(frame.budgets[name]) });
    return translate("objective", { quantile, path: translate(path), limit: number(frame.limits_ms[name]) });
  };

  const drawNow = (frame) => {
    const shown = [tile(number(frame.per_second), "/s", translate("decisions")), tile(number(frame.lag), "", translate("waiting"))];
    shown.push(...tiles(frame.watts, "W", translate("power"), translate("no_meter")));
    if (frame.workers) {
      const [running, all] = frame.workers;
      shown.push(tile(`${running < all ? "▲ " : ""}${running} / ${all}`, "", translate("workers")));
    }
    if (frame.lost_meters.length) shown.push(tile("▲", "", translate("lost_meters", { names: frame.lost_meters.join(", ") })));
    place("now", ...shown);
  };

  const drawWindow = (frame) => {
    document.getElementById("span").textContent = translate("last", { span: span(frame.seconds) });
    place(
      "window",
      tile(percent(frame.escalated_share), "", translate("escalated_share")),
      tile(percent(frame.degraded_share), "", translate("degraded_share")),
      ...tiles(frame.mj_per_decision, "mJ", translate("per_decision"), translate("no_meter")),
      ...tiles(frame.carbon_g_per_million, "gCO2e", translate("carbon"), translate("no_carbon")),
    );
    const paths = frame.paths.map((path) => [
      translate(path.path),
      number(path.per_second),
      ...Object.entries(QUANTILES).map(([quantile, field]) => {
        const high = over(path[field], limitOf(frame, quantile, path.path));
        return made("td", `${high ? "▲ " : ""}${number(path[field])}`, high ? "bad" : undefined);
      }),
    ]);
    place("paths", table([translate("path"), "/s", ...Object.keys(QUANTILES)], paths));
    const objectives = Object.entries(frame.burn).map(([name, burn]) => {
      const state = !known(burn) ? "no_data" : burn <= 1 ? "within" : "over";
      const look = { within: "good", over: "bad" }[state];
      const word = `${state === "over" ? "▲ " : ""}${translate(state)}`;
      return [objectiveText(frame, name), known(burn) ? `${number(burn)} ×` : "–", made("td", word, look)];
    });
    place("objectives", table([translate("name"), translate("burn"), translate("state")], objectives));
  };

  const drawPlots = () => {
    const frame = frames[frames.length - 1];
    const latency = (path) =>
      plot(`${translate(path)} p99, ms`, (frame) => pathOf(frame, path)?.p99_ms, number, { limit: limitOf(frame, "p99", path) });
    const energy = Object.keys(frame.mj_per_decision).sort().map((kind) =>
      plot(translate("plot_energy"), (frame) => frame.mj_per_decision[kind], number, { kind }),
    );
    place(
      "plots",
      plot(translate("plot_rate"), (frame) => frame.per_second, number),
      latency("screened"),
      latency("escalated"),
      plot(translate("escalated_share"), (frame) => frame.escalated_share, percent),
      plot(translate("waiting"), (frame) => frame.lag, number),
      ...energy,
    );
  };

  const drawParts = (components) => {
    const whole = made("ul");
    for (const part of components) {
      const good = part.status === "ok";
      const item = made("li");
      const name = made("span", part.name);
      const text = made("span", part.text);
      // names and texts of the service are always English
      name.lang = text.lang = "en";
      item.append(name, ": ", made("span", `${good ? "" : "▲ "}${translate(`status_${part.status}`)}`, good ? "good" : "bad"));
      item.append(" ", text);
      whole.append(item);
    }
    place("parts", whole);
  };

  // --- asking

  // set only when it changes: a screen reader reads it aloud each time
  const showStatus = (text, bad) => {
    const status = document.getElementById("status");
    if (status.textContent !== text) status.textContent = text;
    status.className = bad ? "bad" : "";
    document.getElementById("figures").classList.toggle("stale", bad && frames.length > 0);
  };

  const take = (answer) => {
    // the service was restarted: the page's frames are of the earlier run
    const restarted = answer.newest < newest;
    if (restarted) frames = [];
    newest = restarted ? 0 : answer.newest;
    frames = frames.concat(answer.frames).slice(-FRAMES_KEPT);
    drawParts(answer.components);
    if (frames.length) {
      drawNow(frames[frames.length - 1]);
      drawPlots();
    }
    if (answer.window) drawWindow(answer.window);
    const failing = answer.failing.length > 0;
    const state = failing ? "failing" : answer.ready ? "ready" : "not_ready";
    showStatus(`${failing ? "▲ " : ""}${translate(state)}${frames.length ? "" : ` · ${translate("first")}`}`, failing);
    document.getElementById("at").textContent = `· ${new Date(1000 * answer.at_s).toLocaleTimeString(language)}`;
  };

  const ask = async () => {
    // a hidden page needs no figures, and reading meters costs power
    if (!document.hidden) {
      try {
        const signal = AbortSignal.timeout(ANSWER_MS_MAX);
        const response = await fetch(`frames?after=${newest}`, { cache: "no-store", signal });
        if (!response.ok) throw new Error(`status ${response.status}`);
        take(await response.json());
      } catch (error) {
        showStatus(`▲ ${translate("silent")}`, true);
      }
    }
    setTimeout(ask, EVERY_MS);
  };

  for (const link of document.querySelectorAll("nav a")) {
    if (link.lang === language) link.setAttribute("aria-current", "true");
  }
  ask();
})();
