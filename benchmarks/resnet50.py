"""Shapes of the parameters of ResNet-50 (He et al., 2015, arXiv:1512.03385)."""

ELEMENTS = 25_557_032


def shapes() -> list[tuple[int, ...]]:
    """Of all 161, in the order of the layers."""
    found, width = [(64, 3, 7, 7), (64,), (64,)], 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            wide = 4 * planes
            found += [(planes, width, 1, 1), (planes,), (planes,)]
            found += [(planes, planes, 3, 3), (planes,), (planes,)]
            found += [(wide, planes, 1, 1), (wide,), (wide,)]
            if block == 0:
                found += [(wide, width, 1, 1), (wide,), (wide,)]
            width = wide
    return [*found, (1000, 2048), (1000,)]
