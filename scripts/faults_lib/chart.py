"""Series as an SVG of panels, one below the other, each from zero up."""

from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, GAP = 720, 110, 70, 40


def panels(lines):
    """`lines`: the title of each panel and its points, in seconds."""
    last = max((points[-1][0] for points in lines.values() if points), default=1) or 1
    parts = [panel(number, title, points, last) for number, (title, points) in enumerate(lines.items())]
    height = len(lines) * (HEIGHT + GAP) + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + LEFT + 20} {height}" '
        'font-family="sans-serif" font-size="12" fill="#333">'
        '<rect width="100%" height="100%" fill="#fff"/>' + "".join(parts) + "</svg>\n"
    )


def panel(number, title, points, last):
    top = GAP + number * (HEIGHT + GAP)
    most = max((value for _, value in points), default=0) or 1
    path = " ".join(
        f"{LEFT + seconds / last * WIDTH:.1f},{top + HEIGHT - value / most * HEIGHT:.1f}" for seconds, value in points)
    return (
        f'<text x="{LEFT}" y="{top - 8}">{escape(title)}</text>'
        f'<text x="{LEFT - 6}" y="{top + 10}" text-anchor="end">{most:,.2f}</text>'
        f'<text x="{LEFT - 6}" y="{top + HEIGHT}" text-anchor="end">0</text>'
        f'<text x="{LEFT + WIDTH}" y="{top + HEIGHT + 15}" text-anchor="end">{last / 60:.1f} min</text>'
        f'<path d="M{LEFT} {top}V{top + HEIGHT}H{LEFT + WIDTH}" fill="none" stroke="#bbb"/>'
        f'<polyline points="{path}" fill="none" stroke="#2066a8" stroke-width="1.5"/>'
    )
