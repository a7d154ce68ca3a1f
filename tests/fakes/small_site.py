"""A web site of a few pages, as a program: `python small_site.py PORT`.

Pages link each other by number; some answer with an error, redirect, or take long. Every answer says how often the site
was asked, so that a page that is fetched twice is seen to be.
"""

from __future__ import annotations

import asyncio
import sys

from aiohttp import web

NUM_PAGES = 12
COUNT = [0]


async def page(request: web.Request) -> web.Response:
    COUNT[0] += 1
    number = int(request.match_info["number"])
    if number == 5:
        raise web.HTTPFound("/p/6")
    if number == 7:
        return web.Response(status=500, text="broken")
    if number == 8:
        await asyncio.sleep(30)
    if number == 9:
        return web.json_response({"answer": COUNT[0]})
    links = "".join(f'<li><a href="/p/{(number * k + 1) % NUM_PAGES}">page {k}</a></li>' for k in range(1, 5))
    facts = "".join(f"<p>Fact {i} of {number} is {i * number}.</p>" for i in range(20))
    return web.Response(
        text=f"<title>Page {number}</title><body><h1>Page {number}</h1><p>Answer {COUNT[0]}</p><ul>{links}</ul>{facts}",
        content_type="text/html",
    )


def main() -> None:
    app = web.Application()
    app.router.add_get("/p/{number}", page)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)


if __name__ == "__main__":
    main()
