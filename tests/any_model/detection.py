"""Detectors of torchvision, small, on two images at once: the score of each image's first box; and optical flow."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.optical_flow import raft, raft_small
from torchvision.ops import DeformConv2d, MultiScaleRoIAlign, nms, roi_align

from . import Case

LABELS = 5
SIDE = 48


class Backbone(nn.Module):
    """A stride of four in two convolutions, and a second map of half the size where two are asked for."""

    def __init__(self, channels: int = 8, maps: int = 1) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.last = nn.Sequential(nn.Conv2d(channels, channels, 3, 2, 1), nn.ReLU())
        self.out_channels, self.maps = channels, maps

    def forward(self, x: Tensor) -> Any:
        x = self.last(self.first(x))
        return OrderedDict([("0", x), ("1", x[..., ::2, ::2])]) if self.maps == 2 else x


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, dtype=torch.float64)


def regions(size: int) -> MultiScaleRoIAlign:
    return MultiScaleRoIAlign(["0"], size, 2)


def two_stages(kind: type[nn.Module], **parts: Callable[[], nn.Module]) -> Callable[[], tuple[nn.Module, Tensor]]:
    def build() -> tuple[nn.Module, Tensor]:
        model = kind(
            Backbone(),
            min_size=SIDE,
            max_size=64,
            rpn_anchor_generator=AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),)),
            rpn_post_nms_top_n_test=20,
            rpn_pre_nms_top_n_test=40,
            box_score_thresh=0.0,
            box_detections_per_img=3,
            box_roi_pool=regions(3),
            box_head=TwoMLPHead(8 * 9, 16),
            box_predictor=FastRCNNPredictor(16, LABELS),
            **{name: make() for name, make in parts.items()},
        )
        return model, images()

    return build


def one_stage(kind: type[nn.Module], channels: int, anchors: AnchorGenerator) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (
        kind(
            Backbone(channels),
            LABELS,
            min_size=SIDE,
            max_size=64,
            anchor_generator=anchors,
            score_thresh=0.0,
            detections_per_img=3,
            topk_candidates=20,
        ),
        images(),
    )


def single_shot(head: Callable[[], nn.Module]) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (
        SSD(
            Backbone(maps=2),
            DefaultBoxGenerator([[2], [2, 3]], scales=[0.1, 0.3, 0.6]),
            (SIDE, SIDE),
            LABELS,
            head=head(),
            score_thresh=0.0,
            detections_per_img=3,
        ),
        images(),
    )


def first_box(key: str, *place: int) -> Callable[[list[dict[str, Tensor]]], Tensor]:
    """From a detector's output to a number of each image's first box, (N,)."""
    return lambda found: torch.stack([one[key][(0, *place)].double() for one in found])


mask_rcnn = two_stages(
    detection.MaskRCNN,
    mask_roi_pool=lambda: regions(4),
    mask_head=lambda: MaskRCNNHeads(8, (8,), 1),
    mask_predictor=lambda: MaskRCNNPredictor(8, 8, LABELS),
)
keypoint_rcnn = two_stages(
    detection.KeypointRCNN,
    keypoint_roi_pool=lambda: regions(4),
    keypoint_head=lambda: KeypointRCNNHeads(8, (8,)),
    keypoint_predictor=lambda: KeypointRCNNPredictor(8, LABELS),
)
BACKBONE = ("backbone.first.0", "backbone.first.1", "backbone.last")


def listed() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """As Captum's users wrap a detector: images in a list, the scores of one image's boxes as its row."""
    model, inputs = two_stages(detection.FasterRCNN)()
    model.double().eval()
    return lambda x: torch.stack([found["scores"] for found in model(list(x))]), inputs


class Deformed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.where = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 18, 3, padding=1)
        self.deform, self.head = DeformConv2d(4, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deform(self.conv(x).relu(), self.where(x)).relu().mean((2, 3)))


class Regions(nn.Module):
    """Regions of interest found from the image itself, by non-maximum suppression."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.objectness, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 1, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x).relu()
        found = []
        for image, scores in zip(features, self.objectness(features).flatten(1), strict=True):
            place = torch.arange(len(scores))
            corner = torch.stack([place % SIDE, place // SIDE], 1).to(x.dtype)
            boxes = torch.cat([corner, corner + 6], 1)
            best = nms(boxes, scores, 0.3)[:2]
            found.append(self.head(roi_align(image[None], [boxes[best]], (2, 2)).flatten(1)).mean(0))
        return torch.stack(found)


class Flow(nn.Module):
    """Optical flow from the first three channels to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.model = raft_small()

    def forward(self, x: Tensor) -> Tensor:
        make = raft.make_coords_grid  # in float32 whatever goes in
        with mock.patch.object(raft, "make_coords_grid", lambda *sizes: make(*sizes).to(x.dtype)):
            return self.model(x[:, :3], x[:, 3:], num_flow_updates=2)[-1]  # type: ignore[no-any-return]


CASES = {
    "Faster R-CNN": Case(two_stages(detection.FasterRCNN), first_box("scores"), BACKBONE),
    "Faster R-CNN, images in a list": Case(listed, 0),
    "Faster R-CNN, an edge of a box": Case(
        two_stages(detection.FasterRCNN), first_box("boxes", 0), BACKBONE, gradient=""
    ),
    "Mask R-CNN": Case(mask_rcnn, first_box("scores"), BACKBONE),
    "Mask R-CNN, a pixel of a mask": Case(mask_rcnn, first_box("masks", 0, 20, 20), BACKBONE),
    "Keypoint R-CNN": Case(keypoint_rcnn, first_box("scores"), BACKBONE),
    # the keypoints' scores are float32 whatever goes in
    "Keypoint R-CNN, a keypoint": Case(keypoint_rcnn, first_box("keypoints_scores", 1), BACKBONE, tolerance=1e-6),
    "RetinaNet": Case(
        one_stage(detection.RetinaNet, 8, AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),))),
        first_box("scores"),
        BACKBONE,
    ),
    "FCOS": Case(one_stage(detection.FCOS, 32, AnchorGenerator(((16,),), ((1.0,),))), first_box("scores"), BACKBONE),
    "SSD": Case(single_shot(lambda: SSDHead([8, 8], [4, 6], LABELS)), first_box("scores"), BACKBONE),
    "SSDlite": Case(
        single_shot(lambda: SSDLiteHead([8, 8], [4, 6], LABELS, nn.BatchNorm2d)), first_box("scores"), BACKBONE
    ),
    # where to sample is frozen
    "deformable convolution": Case(lambda: (Deformed(), images(1)), gradient=""),
    "regions by suppression": Case(lambda: (Regions(), images())),
    # it detaches the flow that it refines
    "RAFT, the flow of a square": Case(
        lambda: (Flow(), torch.rand(1, 6, 128, 128, dtype=torch.float64)),
        lambda flow: flow[:, 0, 40:80, 40:80].mean((1, 2)),
        gradient="differences",
    ),
}
