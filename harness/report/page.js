"use strict";

// Tables sort by a click on a heading: up, down, and back to the order in which they were given. Numbers compare by
// the leading one with its unit, other text by its alphabet. What is unknown, and words among numbers, stay last.
{
  const units = { kB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40 };
  const leading = /^[<>≤≥≈~±]?\s*([+\-−]?)\s*(\d[\d,]*(?:\.\d+)?)(e[+\-]?\d+)?(?:\s*(%|[kKMGT]i?B\b))?/;
  const alphabet = new Intl.Collator("en", { numeric: true });
  const next = { ascending: "descending", descending: null };

  const isUnknown = (text) => text === "" || text === "—";
  const numberOf = (text) => {
    const found = leading.exec(text);
    if (!found) return null;
    const [, sign, digits, exponent = "", unit] = found;
    const size = Number(digits.replaceAll(",", "") + exponent) * (units[unit] || 1);
    return sign === "-" || sign === "−" ? -size : size;
  };

  for (const table of document.querySelectorAll("main table")) {
    const body = table.tBodies[0];
    if (!body || body.rows.length < 2) continue;
    const given = [...body.rows];
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const texts = given.map((row) => row.cells[column].textContent.trim());
      const isNumber = (text) => isUnknown(text) || (leading.exec(text) || [])[0] === text;
      const areNumbers = heading.classList.contains("number") || texts.every(isNumber);
      const keys = texts.map((text) => (isUnknown(text) ? null : areNumbers ? numberOf(text) : text));
      const compare = areNumbers ? (one, other) => one - other : alphabet.compare;

      const sort = () => {
        const before = heading.getAttribute("aria-sort");
        const order = before ? next[before] : "ascending";
        for (const other of headings) other.removeAttribute("aria-sort");
        const places = [...given.keys()];
        if (order) {
          heading.setAttribute("aria-sort", order);
          const sign = order === "descending" ? -1 : 1;
          places.sort((one, other) => {
            const [key, than] = [keys[one], keys[other]];
            return key === null || than === null ? (key === null) - (than === null) : sign * compare(key, than);
          });
        }
        body.append(...places.map((place) => given[place]));
      };

      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      button.addEventListener("click", sort);
      heading.append(button);
    });
  }
}
