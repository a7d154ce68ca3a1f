"""One Chromium process: found, started with everything off that a reader of pages does not need, ended without a trace.

It is started through `tools.keeper`, so that nothing of it outlives this process, and driven over a pipe (`tools.cdp`).
All its traffic goes through the proxy that it is given; it resolves no names itself.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tools import keeper
from tools.cdp import BrowserGone, CallFailed, Connection

START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 10.0
NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "msedge",
)
PLACES = (
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
    "/usr/lib/chromium/chromium",
    "/opt/google/chrome/chrome",
    "/snap/bin/chromium",
)
PLAYWRIGHT = (
    ".cache/ms-playwright/chromium-*/chrome-linux*/chrome",
    "Library/Caches/ms-playwright/chromium-*/chrome-mac*/*.app/Contents/MacOS/*",
)

FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--no-default-browser-check",
    "--no-startup-window",
    "--lang=en-US",
    "--hide-scrollbars",
    "--mute-audio",
    "--password-store=basic",
    "--use-mock-keychain",
    # Nothing that goes past the proxy: no name resolution of its own, no QUIC, no UDP of WebRTC, loopback included.
    "--proxy-bypass-list=<-loopback>",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    "--disable-quic",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--webrtc-ip-handling-policy=disable_non_proxied_udp",
    # Nothing that it does on its own.
    "--disable-background-networking",
    "--disable-breakpad",
    "--disable-client-side-phishing-detection",
    "--disable-component-extensions-with-background-pages",
    "--disable-component-update",
    "--component-updater=url-source=http://127.0.0.1:1/",  # the flag above does not stop its first question
    "--disable-crash-reporter",
    "--disable-default-apps",
    "--disable-domain-reliability",
    "--disable-extensions",
    "--disable-notifications",
    "--disable-sync",
    "--dns-prefetch-disable",
    "--no-pings",
    "--disable-features=AutofillServerCommunication,BackForwardCache,CertificateTransparencyComponentUpdater,"
    "DialMediaRouteProvider,"
    "GlobalMediaControls,HttpsFirstBalancedModeAutoEnable,HttpsUpgrades,InterestFeedContentSuggestions,MediaRouter,"
    "NetworkPrediction,NetworkTimeServiceQuerying,OptimizationGuideModelDownloading,OptimizationHints,PaintHolding,"
    "Prerender2,ServiceWorkerAutoPreload,Translate",
    # Pages are read, not looked at.
    "--blink-settings=imagesEnabled=false",
    "--disable-gpu",
    "--disable-remote-fonts",
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
    "--disable-ipc-flooding-protection",
    "--disable-hang-monitor",
    "--disable-prompt-on-repost",
    "--disable-dev-shm-usage",  # /dev/shm is 64 MB in many containers, and a page that fills it crashes
)


TARGETS = ("page", "iframe", "worker", "shared_worker", "service_worker")


class BrowserMissing(Exception):
    """No Chromium is installed, or the one that was named is none. The message says how to mend it."""


class BrowserFailed(Exception):
    """Chromium could not be started; the message ends with its last words."""


@dataclass(frozen=True, slots=True)
class Census:
    """What a browser holds by now. Flat over any number of pages read, or something leaks."""

    processes: int
    """Of the browser: its own, the renderers, the keeper."""
    targets: int
    """Pages and workers that the browser knows."""
    contexts: int
    """Beside the default one."""
    descriptors: int
    """Open in this process, all in all."""
    private_mb: float
    """Resident and shared with no other process, of all its processes."""


def find_chromium(executable: str | Path | None = None) -> Path:
    """The browser to start: `executable`, or the first of the usual names and places.

    Raises:
        BrowserMissing: there is none.
    """
    if executable is not None:
        named = shutil.which(str(executable))
        if named is None:
            raise BrowserMissing(
                f"browse.executable = {str(executable)!r} is no program; leave it out to have it found"
            )
        return Path(named)
    for name in NAMES:
        if found := shutil.which(name):
            return Path(found)
    for place in [
        *PLACES,
        *(str(path) for glob in PLAYWRIGHT for path in sorted(Path.home().glob(glob), reverse=True)),
    ]:
        if os.access(place, os.X_OK):
            return Path(place)
    raise BrowserMissing(
        "no Chromium, Chrome or Edge was found: install one (Debian, Ubuntu: apt-get install chromium; any system: "
        'playwright install chromium), name it in browse.executable, or set browse.engine = "http"'
    )


class Chromium:
    """One process of it, with its children."""

    def __init__(self, executable: Path, proxy: str, user_agent: str) -> None:
        """
        Args:
            executable: as `find_chromium` finds it.
            proxy: `http://127.0.0.1:PORT`, through which all traffic goes.
            user_agent: of every request.
        """
        self.executable = executable
        self._flags = [f"--proxy-server={proxy}", f"--user-agent={user_agent}"]
        self._process: subprocess.Popen[bytes] | None = None
        self.connection: Connection

    async def start(self) -> None:
        """
        Raises:
            BrowserFailed: it could not be started, or did not answer within `START_TIMEOUT_S`.
        """
        with tempfile.TemporaryFile() as log:
            try:
                self._spawn(log)
                await self.connection.start()
                await self.connection.call("Browser.getVersion", timeout_s=START_TIMEOUT_S)
            except (TimeoutError, BrowserGone, CallFailed):
                await self.aclose()
                raise BrowserFailed(f"{self.executable.name} did not start: {_last_words(log)}") from None
            except OSError as error:
                await self.aclose()
                raise BrowserFailed(f"{self.executable.name} could not be started: {error.strerror}") from None
            except BaseException:
                await self.aclose()
                raise

    def _spawn(self, log: IO[bytes]) -> None:
        folder = Path(tempfile.mkdtemp(prefix="distill-gym-browser-"))
        fds: list[int] = []
        try:
            to_browser, from_us = os.pipe()
            fds += to_browser, from_us
            to_us, from_browser = os.pipe()
            fds += to_us, from_browser
            self._process = subprocess.Popen(  # noqa: S603 - an installed browser
                [
                    *keeper.COMMAND,
                    "--grace=0.5",
                    f"--remove={folder}",
                    f"--pipes={to_browser},{from_browser}",
                    str(self.executable),
                    *FLAGS,
                    *self._flags,
                    *sandbox_flags(),
                    f"--user-data-dir={folder / 'profile'}",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=(to_browser, from_browser),
                env=_environment(folder),
                start_new_session=True,
            )
        except OSError:
            for fd in fds:
                os.close(fd)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        os.close(to_browser)
        os.close(from_browser)
        self.connection = Connection(from_us, to_us)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None and not self.connection.gone

    def processes(self) -> list[int]:
        """Ids of the keeper and all below it; empty where /proc does not say."""
        return [] if self._process is None else family(self._process.pid)

    async def census(self) -> Census:
        """
        Raises:
            BrowserGone, TimeoutError: it does not answer.
        """
        targets = await self.connection.call("Target.getTargets", timeout_s=5.0)
        contexts = await self.connection.call("Target.getBrowserContexts", timeout_s=5.0)
        processes = self.processes()
        return Census(
            processes=len(processes),
            targets=len([target for target in targets["targetInfos"] if target["type"] in TARGETS]),
            contexts=len(contexts["browserContextIds"]),
            descriptors=descriptors(),
            private_mb=sum(private_mb(pid) for pid in processes),
        )

    async def aclose(self) -> None:
        """Ends all its processes and removes its folder. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        await self.connection.aclose()
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.to_thread(process.wait, END_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # the keeper itself is stopped or stuck
            for pid in reversed(family(process.pid)):
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
            await asyncio.to_thread(process.wait)


def sandbox_flags() -> tuple[str, ...]:
    """Chromium's sandbox refuses to run as root; the guard, the proxy and the empty environment stay."""
    return ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()


def family(pid: int) -> list[int]:
    """Ids of a process and its descendants, parents first; zombies are left out. Empty where /proc does not say."""
    children: dict[int, list[int]] = {}
    with suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdecimal():
                with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                    state, parent = file.read().rpartition(b") ")[2].split()[:2]
                    if state != b"Z":
                        children.setdefault(int(parent), []).append(int(name))
    found = [pid] if os.path.exists(f"/proc/{pid}") else []
    for member in found:
        found.extend(children.get(member, ()))
    return found


def private_mb(pid: int) -> float:
    """Resident memory that a process shares with no other, in MiB; 0 where /proc does not say."""
    with suppress(OSError, ValueError), open(f"/proc/{pid}/statm") as file:
        resident, shared = file.read().split()[1:3]
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGESIZE") / 2**20
    return 0.0


def descriptors() -> int:
    """Open in this process; 0 where the system does not say."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        with suppress(OSError):
            return len(os.listdir(folder))
    return 0


def _environment(folder: Path) -> dict[str, str]:
    """Little of ours: no key and no token comes near a page, and nothing is written outside the folder."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    home = {name: str(folder) for name in ("HOME", "TMPDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR")}
    return kept | home | {"TZ": "UTC", "DBUS_SESSION_BUS_ADDRESS": "disabled:"}


def _last_words(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:])[:600] or "it said nothing"


if sys.platform == "win32":  # pipes of the protocol are passed on as descriptors
    raise ImportError("the browser engine runs on Linux and macOS; set browse.engine = 'http'")
