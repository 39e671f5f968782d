"""The XMP packet that carries a receipt in JPEG, WebP and TIFF: one RDF description with one property, alone or beside
what other software wrote."""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

_NAMESPACE = "urn:fluxloom:receipt:1"
_DESCRIPTION = '<rdf:Description {rdf}rdf:about="" xmlns:fluxloom="{namespace}" fluxloom:receipt={note}/>'
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '{description}</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
_RDF = 'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" '  # ours brings its prefix: others may use another
_OURS = re.compile(rb"<rdf:Description [^<>]*xmlns:fluxloom=\"urn:fluxloom:receipt:1\"[^<>]*/>")  # < and > are escaped
_BEGIN = re.compile(rb"<(?:[\w.-]+:)?RDF\b[^<>]*(?<!/)>")


def pack(note: str) -> bytes:
    """A packet with the note in it."""
    return _PACKET.format(description=_description(note)).encode()


def join(packet: bytes | None, note: str | None) -> bytes | None:
    """Another's packet, byte for byte, with the note in a description of its own instead of any older one of ours.

    Without a note: the packet without ours, None where nothing else was in it. Where a packet is no XMP that can be
    added to, it is given back as it is: :func:`unpack` then finds no note.
    """
    if packet is None:
        return None if note is None else pack(note)
    theirs = _OURS.sub(b"", packet)
    if theirs != packet and theirs == _PACKET.format(description="").encode():
        return None if note is None else pack(note)
    if note is None:
        return theirs
    begin = _BEGIN.search(theirs)
    at = begin.end() if begin else 0  # before all others, so that it is found before one that was rewritten
    joined = theirs[:at] + _description(note, _RDF).encode() + theirs[at:]
    return joined if unpack(joined) == note else theirs


def unpack(packet: bytes) -> str | None:
    """The note of a packet, also where other software has rewritten the property as an element; else None."""
    name = f"{{{_NAMESPACE}}}receipt"
    try:
        root = ElementTree.fromstring(packet.strip(b"\0 \n"))
    except (ElementTree.ParseError, ValueError, LookupError):  # no XML, or in an encoding that is none
        return None
    for element in root.iter():
        note = element.text if element.tag == name else element.get(name)
        if note is not None:
            return note
    return None


def _description(note: str, rdf: str = "") -> str:
    return _DESCRIPTION.format(rdf=rdf, namespace=_NAMESPACE, note=quoteattr(note))
