"""The XMP packet that carries a receipt in JPEG and WebP: one RDF description with one property."""

from __future__ import annotations

from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

_NAMESPACE = "urn:fluxloom:receipt:1"
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:fluxloom="{namespace}" fluxloom:receipt={note}/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


def pack(note: str) -> bytes:
    """A packet with the note in it."""
    return _PACKET.format(namespace=_NAMESPACE, note=quoteattr(note)).encode()


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
