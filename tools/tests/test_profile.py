import textwrap

import pytest
from tpu_costing.profile import Figures, read_folder, read_texts

PROFILE = 'hlo_op_estimate {\n  hlo_op_name: "costed0.1"\n  estimated_cycles: 250\n}\n'
BUNDLES = textwrap.dedent("""\
    0x0: bundle slots:
      %s0_s21 = sld [smem:[#allocation0]] /* core id */
      %57 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s10_s9, /*size_in_granules=*/512, /*vmem=*/%s56_s6


    0x1: bundle slots:
      %122 = dma.general /*src=*/%s114_s28, /*size_in_granules=*/2048, /*dst=*/%s95_s20 /* hbm-to-vmem */
      %59 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s10_s9, /*size_in_granules=*/%s41_s2, /*vmem=*/%s56_s6
      %58 = dma.vmem_to_hbm [thread:$0]  /*vmem=*/%s1, /*size_in_granules=*/2, /*hbm=*/%s56_s6
      %75 = dma.hbm_to_smem /*hbm=*/%s8_s8, /*size_in_granules=*/16, /*smem=*/%s61_s28
      %76 = dma.done.wait [#allocation18], 16


    0x2: bundle slots:
      %14 = sst [smem:[#allocation123_spill]] %s9_s8
      %15 = vst [vmem:[#allocation389_spill] sm:$0xff] /*vst_source=*/%v217141_v24
      %16 = vst [vmem:[#allocation3] sm:$0xff] /*vst_source=*/%v217141_v24
      %v17_v1 = vmatmul.mubr.bf16.gmra.mxu0 %v18_v2
      %v19_v1 = vpop.xlane.xlu0 %18
      %v20_v1 = vadd.f32 %v1_v1, %v2_v2
      %v21_v1 = vexp2.f32 %v1_v1
    """)
PATH = textwrap.dedent("""\
    Length to end: 250, %s0_s21 = sld [smem:[#allocation0]]
    Length to end: 248, %57 = dma.hbm_to_vmem /* a copy
    base_bounds: (1) */
    Length to end: 48, %v17_v1 = vmatmul.mubr.bf16.gmra.mxu0 %v18_v2
    Length to end: 10, %v20_v1 = vadd.f32 %v1_v1, %v2_v2
    """)


def test_counts_of_a_kernel():
    figures = read_texts(PROFILE, BUNDLES, PATH)
    assert (figures.cycles, figures.bundles, figures.dmas, figures.dmas_of_any_size) == (250, 3, 4, 1)
    assert (figures.bytes_read, figures.bytes_written) == ((512 + 2048) * 32, 64)
    assert (figures.vector_spills, figures.scalar_spills) == (1, 1)
    expected = {"dma": 6, "scalar": 2, "matrix": 1, "transcendental": 1, "cross-lane": 1, "load": 0, "store": 2}
    assert figures.operations == {**expected, "vector": 1}


def test_critical_path_adds_up_to_the_cycles():
    path = read_texts(PROFILE, BUNDLES, PATH).path
    assert path == {"scalar": 2, "dma": 200, "matrix": 38, "vector": 10}


def test_folder_sums_the_kernels_of_the_name(tmp_path):
    for name in ("costed0.1", "costed1.1", "copy.2"):
        (tmp_path / f"{name}_TPU v5_static_llo_profile.textproto").write_text(PROFILE)
        (tmp_path / f"{name}_bundles.txt").write_text(BUNDLES)
        (tmp_path / f"{name}_critical_path.txt").write_text(PATH)
    assert read_folder(tmp_path, "costed").cycles == 500
    assert read_folder(tmp_path, "other") is None


def test_per_unit_is_the_difference_over_the_units():
    more, fewer = (Figures(cycles=c, bundles=c, operations={"dma": c}) for c in (70, 30))
    unit = more.per_unit(fewer, 8)
    assert (unit.cycles, unit.bundles, unit.operations["dma"]) == pytest.approx((5, 5, 5))
