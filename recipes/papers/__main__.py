from recipes.papers.render import render

print(render(), end="")
