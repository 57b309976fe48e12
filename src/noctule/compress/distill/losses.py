"""Losses between what a student and a teacher make of the same inputs: plain functions, to be added up.

Shapes: B samples, K classes, C channels, H x W pixels, D features. Teachers' tensors are constants: they get no gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def hinton(student_BK: Tensor, teacher_BK: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T^2 KL(teacher || student) of the outputs softened by a temperature T, the mean over the samples.

    Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531. T^2 keeps the size of the
    gradient the same at any temperature.

    >>> hinton(torch.zeros(1, 2), torch.zeros(1, 2)).item()
    0.0
    """
    _check_outputs(student_BK, teacher_BK, temperature)
    return temperature**2 * _divergence(student_BK / temperature, teacher_BK.detach() / temperature)


def dkd(
    student_BK: Tensor,
    teacher_BK: Tensor,
    targets_B: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Hinton's loss in two parts: ``alpha`` times that on the target against the rest, ``beta`` times that among the rest.

    Zhao, Cui, Song, Qiu, Liang 2022, "Decoupled Knowledge Distillation", arXiv 2203.08679. Differs from the authors' code: the
    target is left out of the rest rather than lowered by 1000. Their training lets this loss grow over the first 20 epochs; that
    is the caller's to do.
    """
    _check_outputs(student_BK, teacher_BK, temperature)
    if targets_B.is_floating_point() or targets_B.shape != student_BK.shape[:1]:
        raise ValueError(
            f"dkd needs one class for each sample, got {targets_B.dtype} of shape {tuple(targets_B.shape)}"
        )
    classes = student_BK.shape[1]
    is_rest = torch.ones_like(student_BK, dtype=torch.bool).scatter_(1, targets_B[:, None], False)

    def parts(outputs_BK: Tensor) -> tuple[Tensor, Tensor]:
        scaled = outputs_BK / temperature
        rest = scaled[is_rest].view(-1, classes - 1)
        return torch.stack([scaled.gather(1, targets_B[:, None])[:, 0], rest.logsumexp(1)], 1), rest

    (own_target, own_rest), (target, rest) = parts(student_BK), parts(teacher_BK.detach())
    return temperature**2 * (alpha * _divergence(own_target, target) + beta * _divergence(own_rest, rest))


def fitnets(student: Tensor, teacher: Tensor, regressor: nn.Module | None = None) -> Tensor:
    """The mean squared difference of hidden outputs, (B, D) or (B, C, H, W); the larger image is averaged to the smaller size.

    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", arXiv 1412.6550. Differs from the paper: added to the other losses
    instead of a stage of its own before them, and a mean instead of half a sum.

    Args:
        regressor: brings the student's channels to the teacher's, such as what `regressor` makes; the caller's optimizer has
            to hold its parameters.
    """
    student, teacher = _same_size(student, teacher.detach())
    student = student if regressor is None else regressor(student)
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student has {tuple(student.shape)}, the teacher {tuple(teacher.shape)}: give a regressor=, as made by "
            "regressor(student, teacher)"
        )
    return F.mse_loss(student, teacher)


def regressor(student: Tensor, teacher: Tensor) -> nn.Module:
    """A linear layer, or a 1x1 convolution for images, from the width of one hidden output to that of the other, to be trained."""
    widths, place = (student.shape[1], teacher.shape[1]), {"device": student.device, "dtype": student.dtype}
    return nn.Linear(*widths, **place) if student.dim() == 2 else nn.Conv2d(*widths, 1, **place)


def attention_transfer(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """The mean squared difference of attention maps: squares averaged over the channels, scaled to length 1 for each sample.

    Zagoruyko, Komodakis 2017, "Paying More Attention to Attention", arXiv 1612.03928; the form of the authors' code, which weighs
    it by 1000 / 2. The larger image is averaged to the smaller size.
    """
    if student_BCHW.dim() != 4 or teacher_BCHW.dim() != 4:
        raise ValueError(
            f"attention maps need images (B, C, H, W), the student has {tuple(student_BCHW.shape)}, the teacher "
            f"{tuple(teacher_BCHW.shape)}: tap a convolution"
        )
    maps = (x.square().mean(1, keepdim=True) for x in (student_BCHW, teacher_BCHW.detach()))
    own, teachers = (F.normalize(x.flatten(1)) for x in _same_size(*maps))
    return F.mse_loss(own, teachers)


def rkd(student_BD: Tensor, teacher_BD: Tensor, *, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """How differently embeddings of a batch lie to each other: by the distances of pairs and the angles in triples.

    Distances are over their mean, angles are compared by their cosines. Park, Kim, Lu, Cho 2019, "Relational Knowledge
    Distillation", arXiv 1904.05068. Widths may differ, more dimensions are flattened. Angles take B^3 D operations.
    """
    if len(student_BD) != len(teacher_BD) or len(student_BD) < 2:
        raise ValueError(
            f"relations need the same batch of at least 2 samples, got {len(student_BD)} of the student and "
            f"{len(teacher_BD)} of the teacher"
        )
    own, teachers = student_BD.flatten(1), teacher_BD.detach().flatten(1)
    return distance * F.smooth_l1_loss(_distances(own), _distances(teachers)) + angle * F.smooth_l1_loss(
        _cosines(own), _cosines(teachers)
    )


def mutual(outputs: Sequence[Tensor], targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The sum of each student's cross entropy and its mean divergence from the others, which are constants to it.

    ``outputs`` are (B, K) of each of at least two students, on the same inputs. Zhang, Xiang, Hospedales, Lu 2018, "Deep Mutual
    Learning", arXiv 1706.00384. Differs from the paper: all students step on outputs of the same moment, not one after the other.
    """
    if len(outputs) < 2:
        raise ValueError(f"mutual learning needs the outputs of at least 2 students, got {len(outputs)}")
    losses = [F.cross_entropy(own, targets) for own in outputs]
    for own in outputs:
        losses += [
            hinton(own, other, temperature=temperature) / (len(outputs) - 1) for other in outputs if other is not own
        ]
    return torch.stack(losses).sum()


def self_distillation(
    outputs: Sequence[Tensor] | Tensor, targets: Tensor, *, weight: float = 0.5, temperature: float = 3.0
) -> Tensor:
    """The cross entropy of every exit of a network, and Hinton's loss of the earlier ones from the last: for `fit` as it is.

    ``outputs`` are (B, K) of each exit, the deepest last, as `EarlyExits` returns in training, or the one output in evaluation;
    ``weight`` is the share of the teacher in the loss of an earlier exit. Zhang, Song, Gao, Chen, Bao, Ma 2019, "Be Your Own
    Teacher", arXiv 1905.08094. Differs from the paper: without its hint loss between features, and each exit is weighed the same.
    """
    if isinstance(outputs, Tensor):
        return F.cross_entropy(outputs, targets)
    *early, last = outputs
    losses = [F.cross_entropy(last, targets)]
    for own in early:
        taught = hinton(own, last, temperature=temperature)
        losses.append((1.0 - weight) * F.cross_entropy(own, targets) + weight * taught)
    return torch.stack(losses).sum()


def _divergence(student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    own, teachers = student_BK.log_softmax(1), teacher_BK.log_softmax(1)
    return F.kl_div(own, teachers, reduction="batchmean", log_target=True)


def _check_outputs(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> None:
    if student_BK.shape != teacher_BK.shape or student_BK.dim() != 2 or student_BK.shape[1] < 2:
        raise ValueError(
            f"student and teacher must give (B, K) for the same samples and at least 2 classes, got {tuple(student_BK.shape)} and "
            f"{tuple(teacher_BK.shape)}"
        )
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def _same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both, images averaged to the smaller height and width."""
    if student.dim() != teacher.dim() or len(student) != len(teacher):
        raise ValueError(
            f"the student has {tuple(student.shape)}, the teacher {tuple(teacher.shape)}: tap outputs of one kind"
        )
    if student.dim() != 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


def _distances(x_BD: Tensor) -> Tensor:
    """Distances of all pairs (B, B), over the mean of those of different samples."""
    # the other mode, by a product of matrices, rounds small distances away
    found = torch.cdist(x_BD, x_BD, compute_mode="donot_use_mm_for_euclid_dist")
    return found / (found.sum() / (len(x_BD) * (len(x_BD) - 1))).clamp(min=1e-12)


def _cosines(x_BD: Tensor) -> Tensor:
    """Cosines (B, B, B) of the angles at each sample between two others."""
    directions = F.normalize(x_BD[None] - x_BD[:, None], dim=2)
    return directions @ directions.transpose(1, 2)
