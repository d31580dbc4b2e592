"""The console in a real browser, by keyboard alone, over a plant of real agents."""

import json
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from apps.console.server import PAGES
from apps.maintenance.sync.boxes import save_messages
from apps.maintenance.sync.keys import make_key
from apps.maintenance.sync.operators import Action, Decision
from apps.maintenance.sync.policy import Status
from tests.apps.console.conftest import Plant

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]
MAX_TABS = 60
PLAIN = "plant.example"  # a name by plain http: no secure page
ALERTING = {0: 0.9}


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=which("chromium"),
            args=["--no-sandbox", f"--host-resolver-rules=MAP {PLAIN} 127.0.0.1"],
        )
        yield browser
        browser.close()


class Visit:
    """A page, and whatever it should not do.

    Args:
        browser: That opens it.
        plant: Whose console it is.
        name: By which its host is asked for.
    """

    def __init__(self, browser: "Browser", plant: Plant, name: str = "127.0.0.1") -> None:
        self.url = plant.url.replace("127.0.0.1", name)
        self.page: Page = browser.new_page(viewport={"width": 1280, "height": 800})
        self.troubles: list[str] = []
        host = urlsplit(self.url).netloc
        self.page.on("console", lambda message: self.troubles.append(message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on(
            "request",
            lambda request: (
                None
                if urlsplit(request.url).netloc == host
                else self.troubles.append(f"request: {request.url}")
            ),
        )

    def open(self, path: str) -> None:
        """Go to a page and wait for its figures."""
        self.page.goto(f"{self.url}/console/{path}")
        self.page.locator("#view h1").wait_for()

    def tab_to(self, name: str) -> None:
        """Press Tab until what has this accessible name is focused."""
        wanted = self.page.locator("body").get_by_role("button", name=name, exact=True)
        wanted = wanted.or_(self.page.get_by_role("link", name=name, exact=True))
        wanted = wanted.or_(self.page.get_by_label(name, exact=True)).first
        wanted.wait_for()
        for _ in range(MAX_TABS):
            self.page.keyboard.press("Tab")
            if wanted.evaluate("each => each === document.activeElement"):
                outline = wanted.evaluate("each => getComputedStyle(each).outlineStyle")
                assert outline == "solid", f"{name}: focus cannot be seen"
                return
        raise AssertionError(name)

    def close(self) -> None:
        """Close it; it must have been quiet."""
        assert self.troubles == []
        self.page.close()


def test_an_alert_appears_and_is_acknowledged(browser: "Browser", plant: Plant) -> None:
    visit = Visit(browser, plant)
    page = visit.page
    visit.open("alerts")
    page.get_by_text("No alert waits.").wait_for()
    plant.turn(wear=ALERTING)
    plant.turn(wear=ALERTING)
    page.get_by_text("2 new alerts.").wait_for()
    visit.tab_to("Your name")
    page.keyboard.type("Grace Hopper")
    first = page.get_by_role("button", name="Acknowledge").first.get_attribute("aria-label") or ""
    visit.tab_to(first)
    page.keyboard.press("Enter")
    page.get_by_role("region", name="Newest first").get_by_text("Grace Hopper").wait_for()
    focused = page.evaluate("document.activeElement.dataset.action")
    assert focused == "acknowledge"  # the next one: the hand stays where it was
    page.keyboard.press("Enter")
    page.get_by_text("No alert waits.").wait_for()
    assert page.evaluate("document.activeElement.tagName") == "H1"
    with plant.control.database.transaction() as db:
        rows = db.execute("SELECT agent, name FROM acknowledgements").fetchall()
    assert [tuple(row) for row in rows] == [("box0", "Grace Hopper")] * 2
    page.reload()
    page.get_by_text("No alert waits.").wait_for()
    assert page.get_by_label("Your name").input_value() == "Grace Hopper"
    visit.close()


def test_a_rollout_is_paused_resumed_and_approved(browser: "Browser", plant: Plant) -> None:
    number = plant.begin_two().id
    rollouts = plant.control.rollouts
    visit = Visit(browser, plant)
    page = visit.page
    page.on("filechooser", lambda _: None)  # Chromium is told early that we choose the file
    visit.open("rollouts")

    visit.tab_to(f"Pause rollout {number}")
    page.keyboard.press("Enter")
    page.get_by_role("alert").get_by_text("choose its file first").wait_for()
    assert page.evaluate("document.activeElement.id") == "key"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(plant.key_file)
    page.get_by_text("signs as ada").wait_for()

    for verb, status in (("Pause", Status.PAUSED), ("Resume", Status.RUNNING)):
        visit.tab_to(f"{verb} rollout {number}")
        page.keyboard.press("Enter")
        visit.tab_to("Sign and send")
        page.keyboard.press("Enter")
        page.get_by_text(f"Rollout {number}: {verb.lower()} was signed and done.").wait_for()
        assert rollouts.get(number).status is status

    plant.settle()  # the canary takes it
    visit.tab_to(f"Approve rollout {number}")
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="hidden")
    assert rollouts.get(number).status is Status.AWAITING_APPROVAL
    page.keyboard.press("Enter")  # the button has the focus again
    visit.tab_to("Sign and send")
    page.keyboard.press("Enter")
    page.get_by_text(f"Rollout {number}: approve was signed and done.").wait_for()
    plant.settle()
    page.locator(f"#rollout-{number} .pill", has_text="done").wait_for()
    assert {agent.slots.pointer.version for agent in plant.agents} == {2}
    actors = [entry.actor for entry in plant.control.audit() if entry.action in set(Action)]
    assert actors == ["ada"] * 3
    visit.close()


def test_a_key_of_nobody_is_refused(browser: "Browser", plant: Plant, tmp_path: Path) -> None:
    visit = Visit(browser, plant)
    visit.open("rollouts")
    (tmp_path / "note.pem").write_text("no key")
    make_key(tmp_path / "other.pem")
    for path, message in (
        (tmp_path / "other.pem", "that of an operator (ada), got another"),
        (tmp_path / "note.pem", "expected an Ed25519 private key in PEM"),
    ):
        visit.page.get_by_label("Key file (PEM)").set_input_files(path)
        visit.page.get_by_role("alert").get_by_text(message).wait_for()
        assert visit.page.get_by_text("signs as").count() == 0
    visit.close()


def test_where_the_browser_cannot_sign(browser: "Browser", plant: Plant) -> None:
    number = plant.begin_two().id
    visit = Visit(browser, plant, PLAIN)
    visit.open("rollouts")
    visit.page.get_by_text("A browser signs only on a secure page").wait_for()
    visit.page.get_by_text(f"trimoe sync rollout pause|stop --fleet DIR {number}").wait_for()
    assert visit.page.get_by_role("button").count() == 0
    plant.turn(wear=ALERTING)
    plant.turn(wear=ALERTING)
    visit.open("alerts")
    visit.page.get_by_label("Your name").fill("Ada")
    visit.page.get_by_role("button", name="Acknowledge").first.click()
    visit.page.get_by_role("region", name="Newest first").get_by_text("Ada").wait_for()
    visit.close()


def test_an_offline_box_is_shown_as_such(browser: "Browser", plant: Plant) -> None:
    plant.ahead_s += 1000
    visit = Visit(browser, plant)
    visit.open("")
    plant.turn(offline=(2,))
    row = visit.page.get_by_role("row").filter(has=visit.page.get_by_role("rowheader", name="box2"))
    row.get_by_text("offline").wait_for()
    row.get_by_text("17 min ago").wait_for()
    others = visit.page.get_by_role("row").filter(has_text="online")
    others.nth(2).wait_for()
    assert others.count() == 3
    visit.tab_to("press-2a")
    visit.page.keyboard.press("Enter")
    visit.page.get_by_text("The box was last seen 17 min ago").wait_for()
    plant.turn()
    visit.page.get_by_text("The box was last seen").wait_for(state="hidden")
    visit.close()


def test_every_page_is_quiet_and_fits(browser: "Browser", plant: Plant) -> None:
    plant.begin_two()
    plant.turn(wear=ALERTING)
    plant.telemetry(0, {"vibration": 1.5, "pressure": None})
    plant.turn(wear=ALERTING)
    visit = Visit(browser, plant)
    for width in (360, 390, 1280):
        visit.page.set_viewport_size({"width": width, "height": 844})
        for path in ("", *PAGES):
            suffix = "?agent=box0&machine=press-0a" if path == "machine" else ""
            visit.open(path + suffix)
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
            captions = visit.page.locator("table").count()
            assert visit.page.locator("table > caption").count() == captions
            unnamed = visit.page.locator("svg[role=img]:not([aria-label])").count()
            assert unnamed == 0
    visit.close()


def test_what_a_box_is_called_never_becomes_markup(browser: "Browser", plant: Plant) -> None:
    name = "<img src=x onerror=alert(1)>"
    body: dict[str, object] = {"kind": "alert", "machine": name, "component": name, "version": name}
    body |= {"time": "2026-01-01T00:00:00Z", "hazard": [[0.9]], "life": [1, 2, 3]}
    forecast = {**body, "kind": "forecast"}
    messages = [{"seq": 10**6, "body": body}, {"seq": 10**6 + 1, "body": forecast}]
    save_messages(plant.control.database, "box0", messages)
    visit = Visit(browser, plant)
    for path in ("", "alerts", "drift"):
        visit.open(path)
        visit.page.get_by_text(name).first.wait_for()
        assert visit.page.locator("img").count() == 0
    visit.close()


def test_canonical_bytes_are_those_of_the_operators(browser: "Browser", plant: Plant) -> None:
    visit = Visit(browser, plant)
    visit.open("rollouts")
    for operator in ("ada", 'Jos\u00e9 \U0001f984 \u2028 \x7f "\\/\n\t<&>', "a\x01b"):
        for issued_at in (1795849174.284, 1795849174, 0.1 + 0.2):
            record = Decision(3, "ab" * 32, 1, Action.PAUSE, operator, issued_at)
            given = {
                "stage": 1,
                "rollout": 3,
                "digest": "ab" * 32,
                "operator": operator,
                "action": "pause",
                "issued_at": issued_at,
            }
            found = visit.page.evaluate(
                "async given => (await import('./static/signing.js')).canonical(given)", given
            )
            assert found.encode() == record.to_bytes()
            assert json.loads(found) == given
    visit.close()


def test_a_platform_that_is_gone_is_said(browser: "Browser", plant: Plant) -> None:
    visit = Visit(browser, plant)
    visit.open("")
    visit.page.route("**/api/**", lambda route: route.abort())
    visit.page.get_by_role("alert").get_by_text("it cannot be reached").wait_for()
    visit.page.get_by_text("Figures of").wait_for()
    assert visit.page.get_by_role("link", name="press-0a").count() == 1  # the last figures stay
    visit.page.unroute("**/api/**")
    visit.page.get_by_text("Live.").wait_for()
    assert not visit.page.get_by_role("alert").is_visible()
    visit.troubles = [each for each in visit.troubles if "net::ERR_FAILED" not in each]
    visit.close()
