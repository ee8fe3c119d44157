"""What a module's text says of FLOPs, traffic and collectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from roli_jax.plan import cost, hlo


def compiled(fn, *shapes):
  return jax.jit(fn).lower(*shapes).compile().as_text()


def array(*dims):
  return jax.ShapeDtypeStruct(dims, jnp.float32)


def test_products_in_a_loop_count_as_often_as_it_turns():
  def seven(x, w):
    return jax.lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ w), x)

  shapes = array(4, 16), array(16, 16)
  found = hlo.count(compiled(seven, *shapes))
  assert found.flops == 7 * 2 * 4 * 16 * 16 == cost.flops(seven, *shapes)


def test_a_loop_that_data_ends_turns_as_often_as_it_is_told():
  def until_small(x, w):
    return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ w, x)

  text = compiled(until_small, array(4, 16), array(16, 16))
  once = 2 * 4 * 16 * 16
  assert hlo.count(text).flops == once
  assert hlo.count(text, turns=5).flops == 5 * once


@pytest.mark.parametrize("stride, padding", [(1, 1), (2, 1), (2, 0)])
def test_a_convolution_counts_the_pixels_that_it_meets(stride, padding):
  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), [(padding, padding)] * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip

  side = (7 + 2 * padding - 3) // stride + 1
  at = stride * np.arange(side)[:, None] + np.arange(3) - padding
  met = int(((at >= 0) & (at < 7)).sum()) ** 2
  text = compiled(convolve, array(2, 7, 7, 3), array(3, 3, 3, 5))
  assert hlo.count(text).flops == 2 * 2 * 3 * 5 * met


def test_collectives_are_told_apart_by_loops():
  mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("data",))

  def send(x):
    def turn(_, x):
      return jax.lax.psum(jnp.sin(x), "data") / 4

    return jax.lax.all_gather(jax.lax.fori_loop(0, 3, turn, x), "data")

  rows = PartitionSpec("data")
  sent = jax.shard_map(
    send,
    mesh=mesh,
    in_specs=rows,
    out_specs=PartitionSpec(None, "data"),
    check_vma=False,
  )
  found = hlo.count(compiled(sent, array(32)))
  assert (found.in_loop, found.outside) == (1, 1)
  assert found.bytes_in_loop == 3 * 4 * 8
  assert found.bytes_outside == 4 * 32


MODULE = """HloModule jit_f, is_scheduled=true

%sliced (p: f32[8,100], at: s32[]) -> f32[1,100] {
  %p = f32[8,100]{1,0:T(8,128)} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = f32[1,100]{1,0:T(8,128)} dynamic-slice(%p, %at, %zero), dynamic_slice_sizes={1,100}
}

%updated (p: f32[8,100], row: f32[1,100], at: s32[]) -> f32[8,100] {
  %p = f32[8,100]{1,0:T(8,128)} parameter(0)
  %row = f32[1,100]{1,0:T(8,128)} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = f32[8,100]{1,0:T(8,128)} dynamic-update-slice(%p, %row, %at, %zero)
}

ENTRY %main (x: f32[8,100], at: s32[]) -> f32[8,100] {
  %x = f32[8,100]{1,0:T(8,128)} parameter(0)
  %at = s32[] parameter(1)
  %one = f32[1,100]{1,0:T(8,128)} fusion(%x, %at), kind=kLoop, calls=%sliced
  %start = (f32[1,100]{1,0:T(8,128)S(1)}, f32[1,100]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%one)
  %near = f32[1,100]{1,0:T(8,128)S(1)} copy-done(%start)
  %double = f32[1,100]{1,0:T(8,128)S(1)} add(%near, %near)
  %far = f32[1,100]{1,0:T(8,128)} copy(%double)
  ROOT %new = f32[8,100]{1,0:T(8,128)} fusion(%x, %far, %at), kind=kLoop, calls=%updated
}
"""  # noqa: E501


def test_traffic_is_what_lies_in_main_memory():
  row, scalar = 400, 4
  # The slice read and written; one prefetch; the copy back; the update, read
  # and written in place.
  by_hand = (row + row + scalar) + row + row + (row + row + scalar)
  assert hlo.count(MODULE).traffic == by_hand
  # A GPU's named spaces are main memory too: the copy, sum and copy have both
  # sides in it.
  assert hlo.count(MODULE, on_chip=False).traffic == by_hand + 4 * row


OUTER = """
%outer (p: f32[8,100], at: s32[]) -> f32[1,100] {
  %p = f32[8,100]{1,0:T(8,128)} parameter(0)
  %at = s32[] parameter(1)
  %flat = f32[8,100]{1,0:T(8,128)} bitcast(%p)
  ROOT %one = f32[1,100]{1,0:T(8,128)} fusion(%flat, %at), kind=kLoop, calls=%sliced
}

%renamed (p: f32[8,100]) -> f32[8,100] {
  %p = f32[8,100]{1,0:T(8,128)} parameter(0)
  ROOT %flat = f32[8,100]{1,0:T(8,128)} bitcast(%p)
}

%summed (p: f32[8,100]) -> f32[100] {
  %p = f32[8,100]{1,0:T(8,128)} parameter(0)
  %flat = f32[8,100]{1,0:T(8,128)} fusion(%p), kind=kLoop, calls=%renamed
  ROOT %sum = f32[100]{0:T(128)} custom(%flat)
}

ENTRY"""  # noqa: E501


def test_a_slice_inside_of_a_fusion_of_a_fusion_is_a_slice():
  nested = MODULE.replace("calls=%sliced", "calls=%outer")
  nested = nested.replace("\nENTRY", OUTER)
  assert hlo.count(nested).traffic == hlo.count(MODULE).traffic
  # What is only named anew inside is read whole by whoever uses it.
  whole = nested.replace(
    "calls=%updated\n",
    "calls=%updated\n  %sum = f32[100]{0:T(128)} fusion(%new), kind=kLoop,"
    " calls=%summed\n",
  )
  extra = hlo.count(whole).traffic - hlo.count(nested).traffic
  assert extra == 3200 + 400


@pytest.mark.parametrize("kind, products", [("", 2), ("Backward", 5)])
def test_cudnns_attention_counts_by_formula(kind, products):
  module = f"""HloModule m, is_scheduled=true

ENTRY %main (q: bf16[2,6,3,8]) -> bf16[2,6,3,8] {{
  %q = bf16[2,6,3,8]{{3,2,1,0}} parameter(0)
  ROOT %out = bf16[2,6,3,8]{{3,2,1,0}} custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax{kind}", backend_config={{"cudnn_fmha_backend_config": {{"intermediate_tensor_shape": {{"element_type": "BF16", "dimensions": ["2", "3", "6", "6"]}}}}}}
}}
"""  # noqa: E501
  found = hlo.count(module, on_chip=False)
  assert found.flops == products * 2 * (2 * 3 * 6 * 6) * 8
  # Queries, keys and values are one array here, which is read once.
  assert found.custom_traffic == found.traffic == 2 * (2 * 2 * 6 * 3 * 8)


def test_what_is_no_module_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.count("HloModule m\n")
