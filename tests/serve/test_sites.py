"""Web pages and a server on localhost, and the routes as a browser or a stranger's client tries them."""

import asyncio

import pytest
from serve.inside import QUESTION, running_app

from vidlada.serve.http import SiteRules, site_rules
from vidlada.serve.server import ServerSettings

LOCAL = site_rules("127.0.0.1", keys=False, allowed_hosts=(), origins=())
CHAT, FILES = "/v1/chat/completions", "/v1/files"


def status_of(small, method, path, headers, rules=LOCAL, **options):
    async def run():
        async with running_app(small, site_rules=rules) as (_, http):
            response = await http.request(method, path, headers=headers, **options)
            return response.status_code, response.headers

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}, 200),
        ({"Host": "[::1]:8000", "Origin": "http://[::1]:8000"}, 200),
        ({"Host": "LOCALHOST", "Origin": "http://localhost:80"}, 200),
        ({"Host": "rebinding.example"}, 403),
        ({"Host": "rebinding.example", "Origin": "http://rebinding.example"}, 403),
        ({"Host": "localhost.example.com"}, 403),
        ({"Host": "[::1].example.com"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "https://example.com"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Origin": "http://localhost.example.com"}, 403),
    ],
)
def test_foreign_pages_may_not_use_a_server_without_keys(small, headers, status):
    assert status_of(small, "GET", "/v1/models", headers)[0] == status
    assert status_of(small, "POST", CHAT, headers, json=QUESTION)[0] == status
    assert status_of(small, "POST", FILES, headers, files={"file": ("x", b"x")})[0] == status


def test_a_form_of_a_foreign_page_is_refused(small):
    """What a page can send without asking: three content types, and an Origin that it cannot change."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b"):
        assert status_of(small, "POST", CHAT, {"Content-Type": kind}, content=b"{}")[0] == 415


def test_cors(small):
    page = {"Origin": "https://example.org"}
    asking = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    rules = site_rules("127.0.0.1", keys=False, allowed_hosts=(), origins=("https://example.org",))
    status, headers = status_of(small, "OPTIONS", CHAT, asking, rules)
    assert (status, headers["access-control-allow-origin"]) == (200, "https://example.org")
    status, headers = status_of(small, "POST", CHAT, page, rules, json=QUESTION)
    assert (status, headers["access-control-allow-origin"]) == (200, "https://example.org")
    status, headers = status_of(small, "POST", CHAT, page, rules, json={})
    assert (status, headers["access-control-allow-origin"]) == (422, "https://example.org")
    assert status_of(small, "OPTIONS", CHAT, {**asking, "Origin": "https://example.com"}, rules)[0] == 403
    assert "access-control-allow-origin" not in status_of(small, "GET", "/v1/models", {}, LOCAL)[1]
    everybody = site_rules("127.0.0.1", keys=False, allowed_hosts=(), origins=("*",))
    assert status_of(small, "POST", CHAT, {"Origin": "https://example.com"}, everybody, json=QUESTION)[0] == 200


@pytest.mark.parametrize(
    ("bind", "keys", "allowed", "host", "fits"),
    [
        ("127.0.0.1", False, (), "localhost", True),
        ("127.0.0.2", False, (), "127.0.0.2", True),
        ("localhost", False, (), "evil.example", False),
        ("::1", False, (), "[::1]", True),
        ("::1", False, (), "evil.example", False),
        ("127.0.0.1", False, ("gpu.example",), "gpu.example", True),
        ("127.0.0.1", False, ("gpu.example",), "localhost", True),
        ("127.0.0.1", False, ("*",), "evil.example", True),
        ("0.0.0.0", False, (), "gpu.example", True),
        ("0.0.0.0", False, ("gpu.example",), "evil.example", False),
        ("127.0.0.1", True, (), "proxied.example", True),
        ("127.0.0.1", True, ("gpu.example",), "proxied.example", False),
    ],
)
def test_names_of_a_server(bind, keys, allowed, host, fits):
    rules = site_rules(bind, keys, allowed, ())
    assert (rules.hosts is None or host in rules.hosts) == fits


def test_keys_stand_in_for_the_origin(small):
    """A page cannot know the key, and a proxy's names are its own."""
    assert site_rules("127.0.0.1", keys=True, allowed_hosts=(), origins=()) == SiteRules()


def test_head_works_wherever_get_does(small, tmp_path):
    async def run():
        async with running_app(small) as (app, http):
            upload = (await http.post(FILES, files={"file": ("x.bin", b"content")})).json()["id"]
            paths = [path for path, methods in app.openapi()["paths"].items() if "get" in methods]
            assert len(paths) >= 7
            for path in [*paths, "/", "/openapi.json"]:
                path = path.replace("{file_id}", upload).replace("{name}", "small")
                read, head = await http.get(path), await http.head(path)
                assert head.status_code == read.status_code, path
                assert head.headers["content-type"] == read.headers["content-type"], path
            refused = await http.post("/v1/models")
            assert refused.status_code == 405
            assert "GET" in refused.headers["allow"]

    asyncio.run(run())


def test_the_description_of_the_interface_needs_the_key(small):
    async def run():
        async with running_app(small, api_keys=["secret"]) as (_, http):
            for path in ("/openapi.json", "/docs", "/redoc"):
                for method in ("GET", "HEAD"):
                    assert (await http.request(method, path)).status_code in (401, 404)
            assert (await http.get("/openapi.json")).status_code == 401
            answer = await http.get("/openapi.json", headers={"Authorization": "Bearer secret"})
            assert CHAT in answer.json()["paths"]

    asyncio.run(run())


def test_uploads_are_listed_in_pages(small):
    async def run():
        async with running_app(small) as (_, http):
            ids = []
            for number in range(5):
                form = {"purpose": "vision" if number % 2 else "user_data"}
                ids.append((await http.post(FILES, files={"file": ("x", b"x")}, data=form)).json()["id"])

            async def list_files(**query):
                found, after = [], None
                for _ in range(10):
                    page = (await http.get(FILES, params={**query, **({"after": after} if after else {})})).json()
                    found += [file["id"] for file in page["data"]]
                    if not page["has_more"]:
                        return found
                    assert len(page["data"]) == query["limit"]
                    assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
                    after = page["last_id"]
                raise AssertionError("the pages do not end")

            assert await list_files() == await list_files(limit=2) == await list_files(limit=5) == ids[::-1]
            assert await list_files(order="asc", limit=3) == ids
            assert await list_files(purpose="vision", order="asc", limit=1) == [ids[1], ids[3]]
            assert await list_files(purpose="batch") == []
            for query, status in [({"after": "file-x"}, 404), ({"limit": 0}, 422), ({"order": "up"}, 422)]:
                assert (await http.get(FILES, params=query)).status_code == status

    asyncio.run(run())


PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (PART + b"content\r\n--b--\r\n", 200),
        (PART + b"content\r\n--b--", 200),
        (PART + b"content\r\n--b--\r\nepilogue", 200),
        (PART + b"content\r\n--b\r\n", 400),
        (PART + b"content", 400),
        (PART + b"content\r\n--b-", 400),
        (PART + b"\r\n--b--\r\n", 422),
        (PART[:30], 400),
        (b"", 400),
    ],
)
def test_uploads_that_were_cut_off_or_are_empty(small, body, status):
    async def run():
        async with running_app(small) as (app, http):
            kind = {"Content-Type": "multipart/form-data; boundary=b"}
            response = await http.post(FILES, content=body, headers=kind)
            assert response.status_code == status, response.text
            files = app.state.server.service.files
            assert len(list(files.folder.iterdir())) == (status == 200)
            assert files.arriving == 0

    asyncio.run(run())


def test_one_text_is_one_name_one_origin_and_one_key():
    rules = site_rules("0.0.0.0", False, "example.org", "https://example.org")
    assert rules == site_rules("0.0.0.0", False, ["example.org"], ["https://example.org"])
    assert ServerSettings("small", api_keys="secret").api_keys == ("secret",)
