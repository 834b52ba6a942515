(function () {
  var root = document.documentElement;
  root.classList.add("has-js");
  var tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.appendChild(tip);
  function show(x, y) {
    tip.hidden = false;
    var w = tip.offsetWidth, h = tip.offsetHeight;
    tip.style.left = Math.max(6, Math.min(x + 14, innerWidth - w - 6)) + "px";
    tip.style.top = (y - h - 12 > 6 ? y - h - 12 : y + 18) + "px";
  }
  function text(value) {
    if (value === null || value === undefined) return "–";
    var size = Math.abs(value);
    if (size >= 1e12) return (value / 1e12).toPrecision(4) + "T";
    if (size >= 1e9) return (value / 1e9).toPrecision(4) + "B";
    if (size >= 1e6) return (value / 1e6).toPrecision(4) + "M";
    return String(+value.toPrecision(5));
  }
  function values(x) {
    if (Array.isArray(x)) return x;
    var all = [];
    for (var i = 0; i < x.n; i++) all.push(x.a + i * x.d);
    return all;
  }
  function nearest(list, value) {
    var low = 0, high = list.length - 1;
    while (high - low > 1) {
      var middle = (low + high) >> 1;
      if (list[middle] > value) high = middle; else low = middle;
    }
    return Math.abs(list[high] - value) < Math.abs(list[low] - value) ? high : low;
  }
  document.querySelectorAll("figure.chart").forEach(function (figure) {
    var svg = figure.querySelector("svg"), holder = figure.querySelector("script");
    if (!svg || !holder) return;
    var data = JSON.parse(holder.textContent), cross = svg.querySelector(".cross"), at = 0;
    data.s.forEach(function (series) { series.x = values(series.x); });
    var all = Array.from(new Set([].concat.apply([], data.s.map(function (s) { return s.x; })))).sort(function (a, b) { return a - b; });
    var box = data.box, span = data.x[1] - data.x[0];
    function point(index, clientX, clientY) {
      at = Math.max(0, Math.min(all.length - 1, index));
      var x = all[at], place = box[0] + (box[1] - box[0]) * (x - data.x[0]) / span;
      cross.classList.add("on");
      cross.setAttribute("x1", place);
      cross.setAttribute("x2", place);
      var rows = data.s.map(function (series) {
        var i = nearest(series.x, x);
        var near = series.x.length > 1 ? Math.abs(series.x[series.x.length - 1] - series.x[0]) / (series.x.length - 1) : span;
        if (!series.x.length || Math.abs(series.x[i] - x) > near) return null;
        return { c: series.c, n: series.n, v: series.y[i] };
      }).filter(Boolean);
      tip.textContent = "";
      var head = document.createElement("div");
      head.textContent = data.u + " " + text(x);
      tip.appendChild(head);
      var table = document.createElement("table");
      rows.forEach(function (row) {
        var line = table.insertRow(), name = line.insertCell();
        var chip = document.createElement("span");
        chip.className = "chip c" + row.c;
        chip.style.display = "inline-block";
        chip.style.marginRight = "6px";
        chip.style.verticalAlign = "middle";
        name.appendChild(chip);
        name.appendChild(document.createTextNode(row.n));
        line.insertCell().textContent = text(row.v);
      });
      tip.appendChild(table);
      var frame = svg.getBoundingClientRect();
      show(clientX === undefined ? frame.left + place * frame.width / 380 : clientX, clientY === undefined ? frame.top + 40 : clientY);
    }
    function leave() { cross.classList.remove("on"); tip.hidden = true; }
    function move(event) {
      var frame = svg.getBoundingClientRect();
      var x = (event.clientX - frame.left) * 380 / frame.width;
      point(nearest(all, data.x[0] + span * (x - box[0]) / (box[1] - box[0])), event.clientX, event.clientY);
    }
    svg.addEventListener("pointermove", move);
    svg.addEventListener("pointerdown", move);
    svg.addEventListener("pointerleave", leave);
    figure.tabIndex = 0;
    figure.addEventListener("blur", leave);
    figure.addEventListener("keydown", function (event) {
      var step = Math.max(1, Math.round(all.length / 60));
      if (event.key === "ArrowRight") point(at + step); else if (event.key === "ArrowLeft") point(at - step);
      else if (event.key === "Escape") leave(); else return;
      event.preventDefault();
    });
  });
  document.querySelectorAll(".hm").forEach(function (map) {
    function over(event) {
      var token = event.target.closest("i");
      if (!token) { tip.hidden = true; return; }
      if (token.title) { token.dataset.t = token.title; token.removeAttribute("title"); }
      if (!token.dataset.t) { tip.hidden = true; return; }
      tip.textContent = JSON.stringify(token.textContent) + "  " + token.dataset.t;
      show(event.clientX, event.clientY);
    }
    map.addEventListener("pointerover", over);
    map.addEventListener("pointerdown", over);
    map.addEventListener("pointerleave", function () { tip.hidden = true; });
    var search = map.querySelector("input[type=search]"), count = map.querySelector(".count");
    if (search) search.addEventListener("input", function () {
      var wanted = search.value.toLowerCase(), shown = 0, texts = map.querySelectorAll(".text");
      texts.forEach(function (element) {
        var hit = element.textContent.toLowerCase().indexOf(wanted) >= 0;
        element.hidden = !hit;
        shown += hit;
      });
      count.textContent = wanted ? shown + " of " + texts.length + " texts" : "";
    });
  });
})();
