"""Templates that loop, grow or call themselves without end, over a row with text in `q`."""

ENDLESS = {
    "a range": "{% for i in range(10**9) %}x{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "one range in itself": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{{ j }}{% endfor %}{% endfor %}",
    "loops in loops over text": "{% for a in q %}{% for b in q %}{% for c in q %}{% for d in q %}{% endfor %}"
    "{% endfor %}{% endfor %}{% endfor %}" * 9,
    "repetition": "{{ 'x' * 10**10 }}",
    "a repeated list": "{{ [1] * 10**10 }}",
    "repetition of a column": "{{ q * 10**8 }}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubling by plus": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "lists of themselves": "{% set n = namespace(x=q) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a format width": "{{ '%9999999999d' % 1 }}",
    "a format filter": "{{ '%9999999999s' | format(q) }}",
    "str.format": "{{ '{:>9999999999}'.format(q) }}",
    "a macro": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "a macro of two": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "center": "{{ q | center(10**10) }}",
    "ljust": "{{ q.ljust(10**10) }}",
    "indent": "{{ q | indent(10**10, true) }}",
    "replace": "{% set n = namespace(x=q) %}{% for i in range(99) %}{% set n.x = n.x | replace('', n.x) %}{% endfor %}",
    "join": "{{ range(99999) | join(q * 99999) }}",
    "lipsum": "{{ lipsum(n=10**7) }}",
    "batch": "{{ q | batch(10**10, 'x') | list }}",
    "text of every row": "{{ 'x' * (16 * 10**6) }}",
}
"""Each is refused, with the key's name, in bounded time and memory."""
