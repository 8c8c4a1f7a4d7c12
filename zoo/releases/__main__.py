from . import RELEASES, render

print(render(RELEASES), end="")
