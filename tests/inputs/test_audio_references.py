"""Files that name other files or addresses: nothing but the file itself is opened, whatever it contains and whatever its name."""

import ctypes
import io
import os
import socket
import struct
import sys
from contextlib import suppress

import pytest

from granite_speech.errors import AudioError
from granite_speech.inputs import audio_decoding
from granite_speech.inputs.audio import load_audio, read_blocks
from granite_speech.inputs.audio_headers import Source
from tests.support.made_sounds import boxes, encoded

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs inotify, which Linux alone has, to see what C code opens")
IN_OPEN, IN_NONBLOCK = 0x20, 0o4000


class Watched:
    """A second sound file and a server, which report whether they were opened."""

    def __init__(self, folder):
        self.path = folder / "second.wav"
        self.path.write_bytes(encoded("wav", "pcm_s16le"))
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.events = self.libc.inotify_init1(IN_NONBLOCK)
        assert self.events >= 0
        assert self.libc.inotify_add_watch(self.events, os.fsencode(self.path), IN_OPEN) >= 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.setblocking(False)
        self.url = f"127.0.0.1:{self.server.getsockname()[1]}/second.wav"

    def file_was_opened(self) -> bool:
        try:
            return bool(os.read(self.events, 4096))
        except BlockingIOError:
            return False

    def server_was_called(self) -> bool:
        try:
            self.server.accept()[0].close()
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        os.close(self.events)
        self.server.close()


@pytest.fixture
def watched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # relative names are resolved here
    watched = Watched(tmp_path)
    yield watched
    watched.close()


def test_the_watch_sees_what_is_opened(watched):
    load_audio(watched.path)
    assert watched.file_was_opened() and not watched.file_was_opened()
    socket.create_connection(watched.server.getsockname()).close()
    assert watched.server_was_called() and not watched.server_was_called()


def mpd(address: str) -> str:
    return (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S" '
        'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="audio/mp4"><Representation id="1" '
        f'bandwidth="1"><BaseURL>{address}</BaseURL></Representation></AdaptationSet></Period></MPD>'
    )


def playlists(address: str) -> dict[str, str]:
    return {
        "concat": f"ffconcat version 1.0\nfile '{address}'\n",
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXT-X-VERSION:3\n#EXTINF:5,\n{address}\n#EXT-X-ENDLIST\n",
        "hls of hls": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{address}\n",
        "hls with a key": f'#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{address}"\n#EXTINF:5,\n{address}\n#EXT-X-ENDLIST\n',
        "dash": mpd(address),
        "smil": f'<smil><body><audio src="{address}"/></body></smil>',
        "asx": f'<asx version="3.0"><entry><ref href="{address}"/></entry></asx>',
        "pls": f"[playlist]\nFile1={address}\nNumberOfEntries=1\n",
        "real": f"{address}\n",
        "asf reference": f"[Reference]\nRef1={address}\n",
        "imf": f'<?xml version="1.0"?><CompositionPlaylist><Resource>{address}</Resource></CompositionPlaylist>',
    }


def sdp(server: tuple[str, int]) -> str:
    return f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio {server[1]} RTP/AVP 0\n"


@pytest.mark.parametrize("ending", ["", ".mp3", ".wav", ".mp4", ".m3u8", ".ffconcat", ".mpd"])
def test_playlists_play_nothing(tmp_path, watched, monkeypatch, ending):
    # FFmpeg does not learn the file's name. Here it does, so that its HLS reader, which checks the name, is tried too.
    monkeypatch.setattr(Source, "name", f"sound{ending}", raising=False)
    path = str(watched.path)
    addresses = [path, watched.path.name, f"file://{path}", f"http://{watched.url}", f"tcp://{watched.url.partition('/')[0]}"]
    addresses += [f"concat:{path}", f"subfile,,start,0,end,0,,:{path}", f"data:audio/wav;base64,UklGRg==#{path}"]
    contents = [text.encode() for address in addresses for text in playlists(address).values()]
    contents.append(sdp(watched.server.getsockname()).encode())
    for number, content in enumerate(contents):
        file = tmp_path / f"{number}{ending}"
        file.write_bytes(content)
        with open(file, "rb") as opened:
            for source in (file, opened, io.BytesIO(content)):
                with pytest.raises(AudioError):
                    load_audio(source)
        with pytest.raises(AudioError):
            list(read_blocks(file))
    assert not watched.file_was_opened()
    assert not watched.server_was_called()


def alias(path: str) -> bytes:
    """A Macintosh alias record, as QuickTime writes it for media in another file.

    It says that the target is in the movie's own folder, which is the only kind that FFmpeg follows by default.
    """
    name = os.fsencode(path.rpartition("/")[2])[:62]
    record = b"\0" * 8 + b"\0\0" + b"\4disk".ljust(28, b"\0") + b"\0" * 12 + bytes([len(name)]) + name.ljust(63, b"\0")
    record += b"\0" * 16 + struct.pack(">hh", 1, 1) + b"\0" * 16
    for kind in (2, 18):
        content = os.fsencode(path)
        record += struct.pack(">HH", kind, len(content)) + content + b"\0" * (len(content) % 2)
    return record + struct.pack(">HH", 0xFFFF, 0)


def replaced(content: bytes, place: list[bytes], new: bytes) -> bytes:
    """An MP4 file with the box at the end of that path of types replaced, and the sizes of the boxes around it corrected."""
    for kind, begin, end in boxes(content):
        if kind == place[0]:
            inside = new if len(place) == 1 else content[begin : begin + 8] + replaced(content[begin + 8 : end], place[1:], new)
            return content[:begin] + struct.pack(">I", len(inside)) + inside[4:] + content[end:]
    raise LookupError(place)


def movie(kind: bytes, record: bytes) -> bytes:
    """A QuickTime movie whose sound is in the file that `record` names."""
    entry = struct.pack(">I", 12 + len(record)) + kind + b"\0\0\0\0" + record
    references = struct.pack(">I4sII", 16 + len(entry), b"dref", 0, 1) + entry
    return replaced(encoded("mov", "pcm_s16le"), [b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"], references)


def test_movies_with_their_sound_in_another_file(tmp_path, watched):
    for kind, record in ((b"alis", alias(str(watched.path))), (b"url ", os.fsencode(f"file://{watched.path}") + b"\0")):
        file = tmp_path / "movie.mov"
        file.write_bytes(movie(kind, record))
        for source in (file, io.BytesIO(file.read_bytes())):
            with suppress(AudioError):
                load_audio(source)
    assert not watched.file_was_opened()


@pytest.mark.parametrize("attack", ["ffconcat", "hls", "hls from a server", "movie"])
def test_without_our_options_ffmpeg_would_open_what_these_files_name(watched, monkeypatch, attack):
    """The tests above prove something only if their files work."""
    server = f"tcp://{watched.url.partition('/')[0]}?timeout=100000"
    name, content = {
        "ffconcat": ("sound", playlists(watched.path.name)["concat"].encode()),
        "hls": ("sound.m3u8", playlists(watched.path.name)["hls"].encode()),
        "hls from a server": ("sound.m3u8", playlists(server)["hls of hls"].encode()),
        "movie": ("sound", movie(b"alis", alias(str(watched.path)))),
    }[attack]
    monkeypatch.setattr(Source, "name", name, raising=False)
    with suppress(AudioError):
        load_audio(io.BytesIO(content))
    assert not watched.file_was_opened() and not watched.server_was_called()
    for option in ("format_whitelist", "protocol_whitelist"):
        monkeypatch.delitem(audio_decoding.OPTIONS, option, raising=False)
    monkeypatch.setitem(audio_decoding.OPTIONS, "enable_drefs", "1")
    with suppress(AudioError):
        load_audio(io.BytesIO(content))
    assert watched.server_was_called() if attack == "hls from a server" else watched.file_was_opened()
