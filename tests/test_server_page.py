"""The page, in a real browser: what somebody sees who has never heard of any of this."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from isobatch.engine.receipt_json import read_receipt
from tests.server_harness import Running, serving, slow_down, tiny_folder, tiny_llm

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browsed = pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the PATH, as of Debian's package")
FILES = ("/", "/static/app.js", "/static/tree.js", "/static/style.css")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def server(folder: Path) -> Iterator[Running]:
    with serving({"tiny": tiny_llm(folder), "tiny-stock": tiny_llm(folder, kernels="stock")}) as running:
        yield running
        running.expect_idle()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(server: Running, browser: Browser) -> Iterator[Page]:
    """The page, loaded; nothing may be asked of another host, and nothing may go wrong on it."""
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if is_fault(line) else None)
    page.on("request", lambda asked: problems.append(asked.url) if not ours(asked.url, server) else None)
    page.goto(server.url)
    expect(page.get_by_role("status").first).to_contain_text("Server ready")
    yield page
    page.close()
    assert problems == []


def is_fault(line: ConsoleMessage) -> bool:
    """A refused request is an error to the browser, and to the page something to tell."""
    return line.type == "error" and "status of 400" not in line.text


def ours(url: str, server: Running) -> bool:
    return url.startswith((server.url, "data:", "blob:"))


def ask(page: Page, **settings: object) -> None:
    page.get_by_text("Settings", exact=True).click()
    for label, value in {"Temperature": 1, "Seed": 3, "Tokens": 24, **settings}.items():
        page.get_by_label(label).fill(str(value))
    page.get_by_role("button", name="times under load").click()


@browsed
def test_one_answer_is_counted_drawn_and_kept(page: Page, folder: Path) -> None:
    ask(page)
    expect(page.locator("#verdict")).to_have_text("1 answer", timeout=30_000)
    cells = page.locator("#cells .cell")
    assert cells.count() == 32
    assert len(set(cells.all_text_contents())) == 1
    expect(page.get_by_text("32 of 32 copies say")).to_be_visible()
    expect(page.get_by_role("img")).to_have_attribute("aria-label", re.compile("^32 copies say "))
    assert page.locator("#tree rect").count() == 1
    with page.expect_download() as download:
        page.get_by_role("button", name="Download all answers").click()
    kept: dict[str, Any] = json.loads(Path(download.value.path()).read_text())
    assert kept["system_fingerprint"] == page.locator("#fingerprint").text_content()
    assert len(kept["answers"]) == 33
    assert len({tuple(answer["token_ids"]) for answer in kept["answers"]}) == 1
    with page.expect_download() as download:
        page.get_by_role("button", name="Download receipt").click()
    receipt = read_receipt(Path(download.value.path()))
    assert tiny_llm(folder).verify(receipt).outcome == "verified"


@browsed
def test_answers_that_differ_are_counted_and_drawn_where_they_part(
    page: Page, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own kernels, made to differ for sure: the seed of every other request is another."""
    worker = server.server.workers["tiny-stock"]
    add, calls = worker.engine.add, iter(range(1000))

    def moody(prompt: Any, params: Any, number: int | None = None) -> int:
        return add(prompt, replace(params, seed=next(calls) % 2), number)

    monkeypatch.setattr(worker.engine, "add", moody)
    page.get_by_label("torch's own").check()
    ask(page, **{"Other requests": 0})
    expect(page.locator("#verdict")).to_have_text("2 different answers", timeout=30_000)
    expect(page.locator("#detail")).to_contain_text("16 of 32 copies")
    assert page.locator("#tree rect").count() >= 2
    assert {cell.get_attribute("data-kind") for cell in page.locator("#cells .cell").all()} == {"0", "1"}
    expect(page.locator("#fingerprint")).to_contain_text("none")
    expect(page.get_by_role("button", name="Download receipt")).to_be_hidden()


@browsed
def test_running_requests_are_shown_and_can_be_stopped(
    page: Page, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(server.engine, 0.05, monkeypatch)
    ask(page, Tokens=200)
    expect(page.locator("#status")).to_contain_text("tiny: 1 running, 0 waiting", timeout=10_000)
    expect(page.locator("#verdict")).to_contain_text("Asking")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#verdict")).to_have_text("Stopped")
    expect(page.get_by_role("button", name="times under load")).to_be_enabled()
    server.expect_idle()


@browsed
def test_what_goes_wrong_is_said(page: Page, server: Running) -> None:
    page.get_by_label("Prompt").fill("fox " * 900)
    ask(page, Tokens=256)
    expect(page.get_by_role("alert")).to_contain_text("That did not work", timeout=10_000)


@browsed
def test_keyboard_alone_is_enough(page: Page) -> None:
    page.get_by_label("Prompt").focus()
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "ask":
            break
    page.keyboard.press("Enter")
    expect(page.locator("#verdict")).to_contain_text("answer", timeout=60_000)


@browsed
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(server: Running, browser: Browser, scheme: Any) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(server.url)
    for selector in ("body", "#status", "#ask"):
        colors = page.eval_on_selector(
            selector,
            """element => {
                let behind = element;
                const background = (one) => getComputedStyle(one).backgroundColor;
                while (background(behind) === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
                return [getComputedStyle(element).color, background(behind)];
            }""",
        )
        assert contrast(*colors) >= 4.5, (selector, colors)
    page.close()


def contrast(one: str, other: str) -> float:
    """Of two CSS colours, by WCAG's formula."""

    def luminance(color: str) -> float:
        channels = [int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_page_and_its_parts_are_served_and_name_no_other_host(server: Running) -> None:
    for path in FILES:
        reply = httpx.get(f"{server.url}{path}")
        assert reply.status_code == 200
        assert "default-src 'self'" in reply.headers["content-security-policy"]
        assert "https://" not in reply.text
        assert "http://" not in reply.text.replace("http://www.w3.org/2000/svg", "")
    assert httpx.get(f"{server.url}/static/nothing.js").status_code == 404
