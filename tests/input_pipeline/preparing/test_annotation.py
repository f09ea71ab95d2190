"""Annotation files are found and read; malformed ones are named."""

import pytest

from dualformer_jax import errors
from dualformer_jax.input_pipeline.preparing import annotation


def test_file_is_found_up_to_two_folders_deep(tmp_path):
  deep = tmp_path / 'a' / 'b' / 'list.csv'
  deep.parent.mkdir(parents=True)
  deep.write_text('')
  assert annotation.find_file(tmp_path, 'list.csv') == deep
  assert annotation.find_file(tmp_path.parent, 'list.csv') is None
  (tmp_path / 'list.txt').write_text('')
  names = ('list.csv', 'list.txt')
  assert annotation.find_file(tmp_path, *names) == tmp_path / 'list.txt'


def test_missing_and_malformed_files_are_named(tmp_path):
  with (
    pytest.raises(errors.UserError, match='a.json or b.json not found'),
    annotation.open_file(tmp_path, 'a.json', 'b.json'),
  ):
    pass
  (tmp_path / 'a.json').write_text('{')
  with (
    pytest.raises(errors.UserError, match='a.json: malformed'),
    annotation.open_file(tmp_path, 'a.json') as path,
  ):
    annotation.read_json(path)


def test_table_has_named_columns(tmp_path):
  path = tmp_path / 'table.csv'
  path.write_bytes(b'\xef\xbb\xbfa, b,c\r\n1,"2, 3",x\r\n\r\n4,5 ,y\r\n')
  assert annotation.read_table(path, 'c', 'b') == [['x', '2, 3'], ['y', '5']]
  with pytest.raises(ValueError, match="no column 'd'"):
    annotation.read_table(path, 'd')
  path.write_text('a,b\n1\n')
  with pytest.raises(ValueError, match='too few columns'):
    annotation.read_table(path, 'b')


@pytest.mark.parametrize('mark', [b'', b'\xef\xbb\xbf'])
def test_texts_are_utf8_with_or_without_a_mark(tmp_path, mark):
  path = tmp_path / 'list'
  path.write_bytes(mark + 'größe,1\r\n\r\n猫,2\r\n'.encode())
  assert annotation.read_lines(path) == ['größe,1', '猫,2']
  assert annotation.read_csv(path) == [['größe', '1'], ['猫', '2']]
  path.write_bytes(mark + '["größe"]'.encode())
  assert annotation.read_json(path) == ['größe']


@pytest.mark.parametrize('encoding', ['utf-16', 'latin-1'])
def test_other_encodings_raise_one_line(tmp_path, encoding):
  path = tmp_path / 'list.txt'
  path.write_bytes('größe\n'.encode(encoding))
  byte = {'utf-16': 0, 'latin-1': 2}[encoding]
  for read in (
    annotation.read_lines,
    annotation.read_csv,
    annotation.read_json,
  ):
    with (
      pytest.raises(errors.UserError) as caught,
      annotation.open_file(tmp_path, path.name) as found,
    ):
      read(found)
    message = str(caught.value)
    assert message.startswith(f'{path}: is not UTF-8 text (byte {byte} is')
    assert '\n' not in message


def test_classes_are_sorted_by_number():
  assert annotation.sort_classes({'b': 1, 'c': 2, 'a': 3}, 1) == ['b', 'c', 'a']
  with pytest.raises(ValueError, match='0, 1'):
    annotation.sort_classes({'a': 0, 'b': 2})


def test_listing_takes_names_and_numbers_of_classes():
  listing = annotation.Listing(['x', 'y'])
  listing.add('a', 'y', 'train')
  listing.add('b', [1, 'x'], 'test', in_folder=True)
  assert listing.videos == [
    annotation.ListedVideo('a', ('y',), 'train'),
    annotation.ListedVideo('b', ('y', 'x'), 'test', in_folder=True),
  ]
  for unknown in ('z', 2, -1, ['x', 2]):
    with pytest.raises(ValueError, match='not one of 2 classes'):
      listing.add('c', unknown, 'train')


def test_only_extensions_of_videos_are_removed():
  assert annotation.without_extension('a/b.MP4') == 'a/b'
  assert annotation.without_extension('flickr-1-2.3-4_5') == 'flickr-1-2.3-4_5'
