from . import RELEASES, UNRELEASED, render

print(render(RELEASES, UNRELEASED), end="")
