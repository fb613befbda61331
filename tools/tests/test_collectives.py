from tpu_costing.collectives import by_kind, read_collectives

HLO = """
  %all-reduce.3 = bf16[8,64]{1,0:T(8,128)(2,1)} all-reduce(%dot), channel_id=1, metadata={op_name="jit(step)/dot"}
  %pair = (f32[4]{0}, f32[2,3]{1,0}) all-reduce-start(%a, %b), channel_id=2
  ROOT %gathered = s32[3,2]{1,0} all-gather(%all-reduce.3), dimensions={1}
  %other = f32[8]{0} add(%all-reduce.3, %gathered)
"""


def test_collectives_with_their_bytes_and_sources():
    found = read_collectives(HLO)
    assert [each.kind for each in found] == ["all-reduce", "all-reduce", "all-gather"]
    assert [each.shapes for each in found] == [((8, 64),), ((4,), (2, 3)), ((3, 2),)]
    assert [each.num_bytes for each in found] == [1024, 40, 24]
    assert [each.source for each in found] == ["jit(step)/dot", "", ""]
    assert by_kind(found) == {"all-reduce": (2, 1064), "all-gather": (1, 24)}
