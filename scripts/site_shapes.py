"""Keeps shapes in signatures of the documentation site as they are written.

Griffe, which reads the signatures, takes one-word strings for names of types:
it makes Float[Array, 'b'] Float[Array, b].
"""

import griffe


class Shapes(griffe.Extension):
  """Quotes the shapes of arrays again."""

  def on_function(self, *, func: griffe.Function, **_: object) -> None:
    """Mends the signature of a function."""
    for parameter in func.parameters:
      _quote_shapes(parameter.annotation)
    _quote_shapes(func.returns)

  def on_attribute(self, *, attr: griffe.Attribute, **_: object) -> None:
    """Mends the type of an attribute."""
    _quote_shapes(attr.annotation)


def _quote_shapes(annotation: str | griffe.Expr | None) -> None:
  if not isinstance(annotation, griffe.Expr):
    return
  if (
    isinstance(annotation, griffe.ExprSubscript)
    and annotation.canonical_path.startswith('jaxtyping.')
    and isinstance(annotation.slice, griffe.ExprTuple)
  ):
    array, shape = annotation.slice.elements
    annotation.slice.elements = [array, repr(str(shape).strip("' "))]
  for part in annotation:
    if part is not annotation:  # a name consists of itself
      _quote_shapes(part)
