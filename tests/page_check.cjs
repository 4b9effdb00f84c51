// Looks at the status page in a real browser, light and dark, wide and on a phone: no console error, nothing that
// overflows, nothing that axe finds, everything within reach of the keyboard, and the time to the first paint of the
// front page. tests/test_page.py runs it; `make page-tools` gets what it requires. By hand, with a daemon and its page:
//
//   NODE_PATH=.cache/page/node_modules CHROMIUM=/usr/bin/chromium \
//     node tests/page_check.cjs http://127.0.0.1:8787 [TOKEN] [FOLDER FOR SCREENSHOTS]
const fs = require("node:fs");
const puppeteer = require("puppeteer-core");
const axe = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const [base, token, folder] = process.argv.slice(2);
const views = [["light", 1200], ["dark", 1200], ["light", 390], ["dark", 390]];
const PAGES = 8, PAINTS = 9;
let problems = 0;

function problem(...words) {
  problems += 1;
  console.log("PROBLEM", ...words);
}

async function pagesOf(page) {
  await page.goto(base + "/");
  const links = await page.$$eval("main a[href^='/']", (all) => all.map((one) => new URL(one.href).pathname));
  return [...new Set(["/", "/runs", "/quarantine", "/log", ...links])].slice(0, PAGES);
}

async function signIn(page) {
  await page.goto(base + "/");
  await page.click("details.session summary");
  await page.type("input[name=token]", token);
  await Promise.all([page.waitForNavigation(), page.click(".session form button")]);
}

async function look(page, path, mode, width) {
  await page.goto(base + path);
  if (await page.evaluate(() => document.documentElement.scrollWidth > innerWidth)) problem(path, mode, width, "overflows");
  if (folder) await page.screenshot({ path: `${folder}/${mode}-${width}${path.replaceAll("/", "_")}.png`, fullPage: true });
  await page.evaluate(axe);
  const found = await page.evaluate(() => axe.run({ resultTypes: ["violations"] }));
  for (const each of found.violations) problem(path, mode, width, each.impact, each.id, each.nodes[0].html.slice(0, 120));
  console.log("looked at", mode, width, path);
}

// the first Tab offers to skip the navigation, and the others reach everything that can be clicked
async function keyboard(page) {
  await page.goto(base + "/");
  const clickable = await page.$$eval("a[href], button, summary, [tabindex='0']", (all) => all.filter((one) => one.checkVisibility()).length);
  await page.keyboard.press("Tab");
  if (!(await page.evaluate(() => document.activeElement.matches(".skip")))) problem("the first Tab does not offer to skip");
  const reached = await page.evaluateHandle(() => new Set());
  for (let number = 0; number < clickable; number += 1) {
    await page.evaluate((all) => all.add(document.activeElement), reached);
    await page.keyboard.press("Tab");
  }
  const found = await reached.evaluate((all) => all.size);
  if (found < clickable) problem("Tab reaches", found, "of", clickable);
}

// milliseconds from the navigation to the first contentful paint, as the browser measures them
async function paint(page) {
  await page.goto(base + "/");
  const painted = () => performance.getEntriesByName("first-contentful-paint")[0]?.startTime;
  return page.waitForFunction(painted, { timeout: 5000 }).then((found) => found.jsonValue(), () => NaN);
}

async function paints(page) {
  const all = [];
  for (let number = 0; number < PAINTS; number += 1) all.push(await paint(page));
  all.sort((a, b) => a - b);
  console.log(`first paint ${Math.round(all[0])} ${Math.round(all[(PAINTS - 1) / 2])} ms: the fastest and the median of ${PAINTS}`);
}

async function main() {
  const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
  for (const [mode, width] of views) {
    const page = await (await browser.createBrowserContext()).newPage();
    page.on("console", (message) => message.type() === "error" && problem("console", message.text()));
    page.on("pageerror", (error) => problem("script", error.message));
    await page.setViewport({ width, height: 900 });
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: mode }]);
    if (token) await signIn(page);
    const paths = await pagesOf(page);
    await page.setBypassCSP(true); // for axe itself, which is injected
    for (const path of paths) await look(page, path, mode, width);
  }
  await keyboard(await (await browser.createBrowserContext()).newPage());
  await paints(await (await browser.createBrowserContext()).newPage());
  await browser.close();
  console.log(problems ? `${problems} problems` : "no problem found");
  process.exitCode = problems ? 1 : 0;
}

main();
