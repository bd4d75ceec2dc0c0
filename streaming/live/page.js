"use strict";
(() => {
  const words = JSON.parse(document.documentElement.dataset.words);
  const language = document.documentElement.lang;
  const FRAMES_KEPT = 150;
  const SPAN_S = 300;
  const EVERY_MS = 2000;
  const ANSWER_MS_MAX = 5000;
  // frames further apart were not watched between: the line has a gap there
  const GAP_S = 8;
  const QUANTILES = { p50: "p50_ms", p99: "p99_ms", "p99.9": "p999_ms" };
  let frames = [];
  let newest = 0;

  // --- words and figures: what is not known is –, never 0

  const say = (name, filled = {}) =>
    Object.entries(filled).reduce((text, [key, value]) => text.replace(`{${key}}`, value), words[name] ?? name);
  const known = (value) => typeof value === "number" && Number.isFinite(value);
  const number = (value) => {
    if (!known(value)) return "–";
    const digits = Math.abs(value) >= 100 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 3 };
    return value.toLocaleString(language, digits);
  };
  const percent = (share) => (known(share) ? `${number(100 * share)} %` : "–");
  const span = (seconds) =>
    seconds < 90 ? say("seconds", { n: Math.round(seconds) }) : say("minutes", { n: number(Math.round(seconds / 6) / 10) });
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
    if (kind) card.append(" ", made("span", say(kind), `kind ${kind}`));
    return card;
  };
  // one tile for each kind of joules; where there is none, one that says so
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
      // a line to the same place is a dot: a lone point is seen too
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
    const scale = [points.length ? say("most", { value: show(top) }) : say("no_data")];
    if (known(limit)) scale.push(say("dashed", { value: show(limit) }));

    const caption = made("figcaption");
    const title = made("span", text);
    if (kind) title.append(" ", made("span", say(kind), `kind ${kind}`));
    caption.append(title, made("b", last));
    const label = [kind ? `${text}, ${say(kind)}` : text, last, ...scale].join("; ");
    const svg = drawn("svg", { viewBox: "0 0 300 60", preserveAspectRatio: "none", role: "img", "aria-label": label });
    if (known(limit)) svg.append(drawn("line", { x1: 0, x2: 300, y1: y(limit), y2: y(limit) }));
    if (points.length) svg.append(drawn("path", { d: outline(points, x, y) }));
    const line = made("div", undefined, "scale");
    line.append(made("span", say("ago")), made("span", scale.join(" · ")), made("span", say("now")));
    const figure = made("figure");
    figure.append(caption, svg, line);
    return figure;
  };

  // --- the page's parts

  const pathOf = (frame, name) => frame.paths.find((one) => one.path === name);
  const limitOf = (frame, quantile, path) => frame.limits_ms[`${quantile} of ${path}`];
  const objectiveText = (frame, name) => {
    const [quantile, path] = name.split(" of ");
    if (path === undefined) return say("degraded_at_most", { limit: percent(frame.budgets[name]) });
    return say("objective", { quantile, path: say(path), limit: number(frame.limits_ms[name]) });
  };

  const drawNow = (frame) => {
    const shown = [tile(number(frame.per_second), "/s", say("decisions")), tile(number(frame.lag), "", say("waiting"))];
    shown.push(...tiles(frame.watts, "W", say("power"), say("no_meter")));
    if (frame.workers) {
      const [running, all] = frame.workers;
      shown.push(tile(`${running < all ? "▲ " : ""}${running} / ${all}`, "", say("workers")));
    }
    if (frame.lost_meters.length) shown.push(tile("▲", "", say("lost_meters", { names: frame.lost_meters.join(", ") })));
    place("now", ...shown);
  };

  const drawWindow = (frame) => {
    document.getElementById("span").textContent = say("last", { span: span(frame.seconds) });
    place(
      "window",
      tile(percent(frame.escalated_share), "", say("escalated_share")),
      tile(percent(frame.degraded_share), "", say("degraded_share")),
      ...tiles(frame.mj_per_decision, "mJ", say("per_decision"), say("no_meter")),
      ...tiles(frame.carbon_g_per_million, "gCO2e", say("carbon"), say("no_carbon")),
    );
    const paths = frame.paths.map((one) => [
      say(one.path),
      number(one.per_second),
      ...Object.entries(QUANTILES).map(([quantile, field]) => {
        const high = over(one[field], limitOf(frame, quantile, one.path));
        return made("td", `${high ? "▲ " : ""}${number(one[field])}`, high ? "bad" : undefined);
      }),
    ]);
    place("paths", table([say("path"), "/s", ...Object.keys(QUANTILES)], paths));
    const objectives = Object.entries(frame.burn).map(([name, burn]) => {
      const state = !known(burn) ? "no_data" : burn <= 1 ? "within" : "over";
      const look = { within: "good", over: "bad" }[state];
      const word = `${state === "over" ? "▲ " : ""}${say(state)}`;
      return [objectiveText(frame, name), known(burn) ? `${number(burn)} ×` : "–", made("td", word, look)];
    });
    place("objectives", table([say("name"), say("burn"), say("state")], objectives));
  };

  const drawPlots = () => {
    const frame = frames[frames.length - 1];
    const latency = (path) =>
      plot(`${say(path)} p99, ms`, (one) => pathOf(one, path)?.p99_ms, number, { limit: limitOf(frame, "p99", path) });
    const energy = Object.keys(frame.mj_per_decision).sort().map((kind) =>
      plot(say("plot_energy"), (one) => one.mj_per_decision[kind], number, { kind }),
    );
    place(
      "plots",
      plot(say("plot_rate"), (one) => one.per_second, number),
      latency("screened"),
      latency("escalated"),
      plot(say("escalated_share"), (one) => one.escalated_share, percent),
      plot(say("waiting"), (one) => one.lag, number),
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
      // the service's own words, in whatever language the page is
      name.lang = text.lang = "en";
      item.append(name, ": ", made("span", `${good ? "" : "▲ "}${say(`status_${part.status}`)}`, good ? "good" : "bad"));
      item.append(" ", text);
      whole.append(item);
    }
    place("parts", whole);
  };

  // --- asking

  // written only where it changes: a screen reader tells it each time
  const tell = (text, bad) => {
    const status = document.getElementById("status");
    if (status.textContent !== text) status.textContent = text;
    status.className = bad ? "bad" : "";
    document.getElementById("figures").classList.toggle("stale", bad && frames.length > 0);
  };

  const take = (answer) => {
    // the service began anew: what it has done since is not what we have
    if (answer.newest < newest) frames = [];
    const again = answer.newest < newest;
    newest = again ? 0 : answer.newest;
    frames = frames.concat(answer.frames).slice(-FRAMES_KEPT);
    drawParts(answer.components);
    if (frames.length) {
      drawNow(frames[frames.length - 1]);
      drawPlots();
    }
    if (answer.window) drawWindow(answer.window);
    const failing = answer.failing.length > 0;
    const state = failing ? "failing" : answer.ready ? "ready" : "not_ready";
    tell(`${failing ? "▲ " : ""}${say(state)}${frames.length ? "" : ` · ${say("first")}`}`, failing);
    document.getElementById("at").textContent = `· ${new Date(1000 * answer.at_s).toLocaleTimeString(language)}`;
  };

  const ask = async () => {
    // nobody looks at a hidden page, and reading meters costs power
    if (!document.hidden) {
      try {
        const signal = AbortSignal.timeout(ANSWER_MS_MAX);
        const response = await fetch(`frames?after=${newest}`, { cache: "no-store", signal });
        if (!response.ok) throw new Error(`status ${response.status}`);
        take(await response.json());
      } catch (error) {
        tell(`▲ ${say("silent")}`, true);
      }
    }
    setTimeout(ask, EVERY_MS);
  };

  for (const link of document.querySelectorAll("nav a")) {
    if (link.lang === language) link.setAttribute("aria-current", "true");
  }
  ask();
})();
