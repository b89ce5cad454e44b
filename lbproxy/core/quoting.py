"""Text of objects in messages: escaped, and with an end."""


def quote(value: object) -> str:
    """At most 80 characters of ASCII."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:76]}..."
