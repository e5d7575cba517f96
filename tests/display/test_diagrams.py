"""The diagrams of the notebooks show what they are given."""

from falcon_kit.display.diagrams import draw_blocks, draw_waiting


def test_a_diagram_of_blocks_names_every_part():
    figure = draw_blocks({"parallel": [(-1, 0.3, 3.8, ("norm", "attention")), (1, 0.3, 3.8, ("norm", "MLP"))]})
    (axes,) = figure.axes
    assert axes.get_title() == "parallel"
    assert {"norm", "attention", "MLP"} <= {text.get_text() for text in axes.texts}


def test_the_block_of_the_40b_has_one_sum_and_that_of_gpt_3_two():
    falcon, gpt = draw_blocks().axes
    places = [{text.get_position()[1] for text in axes.texts if text.get_text() == "+"} for axes in (falcon, gpt)]
    assert [len(each) for each in places] == [1, 2]
    assert falcon.get_title().startswith("Falcon-40B")


def test_with_a_device_map_each_of_four_gpus_reads_a_quarter_of_the_time():
    device_map, parallel = draw_waiting(read_all=0.05, all_reduce=20e-6, gpus=4, layers=60).axes
    assert device_map.get_title().endswith("reads 25% of the time")
    assert parallel.get_title().endswith("reads 91% of the time")
