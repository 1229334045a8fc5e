"""The claims of rectified flow (Liu et al. 2209.03003) on a CPU."""

from pantarhei.reproduce.claims import Claim, Experiment
from pantarhei.reproduce.rectified_flow import adaptation, colours, digits, points, styles

EXPERIMENTS = (
    Experiment(
        "unified",
        "One call each: noise to a ring of eight modes, and this ring to two moons. Perceptron of 3 x 128, 5,000 Adam steps "
        "of batch 512; 100,000 fresh points, 100 Euler steps; sliced 2-Wasserstein distance to fresh data, beside that of "
        "the points that were not transported and that of two fresh data sets (floor).",
        points.unified,
        (
            Claim(
                "One loss generates",
                "generation_ratio",
                "distance left, as a share of the untransported",
                "at most",
                0.1,
            ),
            Claim(
                "The same loss transfers between two data sets",
                "transfer_ratio",
                "distance left, as a share of the untransported",
                "at most",
                0.1,
            ),
        ),
        pictures={"transfer.png": "Paths of 200 points from eight modes to two moons (seed 0)."},
    ),
    Experiment(
        "colours",
        "Real data: the colours of scikit-learn's photograph of a flower (50,000 pixels as points in the cube) are carried "
        "to those of its photograph of a temple, and back. Perceptron of 4 x 256, 4,000 Adam steps of batch 1,024.",
        colours.colour_transfer,
        (
            Claim(
                "Transfer between real data sets",
                "ratio",
                "sliced distance left, as a share of the untransported",
                "at most",
                0.1,
            ),
            Claim("The same flow runs backwards", "reverse_ratio", "share left, second to first", "at most", 0.1),
        ),
        pictures={
            "colours.png": "The flower, the temple; the flower in the temple's colours, the temple in the flower's (seed 0)."
        },
    ),
    Experiment(
        "marginals",
        "Exact field from noise to three modes: the law of Z_t against that of X_t at t = 0.25, 0.5, 0.75, 1 by energy "
        "distance, 1,000 points each, permutation test with 199 deals, corrected for four tests.",
        points.marginals,
        (Claim("Marginals are preserved", "corrected_p", "least corrected p-value", "at least", 0.05),),
    ),
    Experiment(
        "balance",
        "E|X1 - X0|^2 = E|Z1 - Z0|^2 + S + V for the same exact field, 10,000 pairs, 200 steps.",
        points.balance_identity,
        (Claim("The balance of costs is exact", "remainder", "remainder, relative", "at most", 0.01),),
    ),
    Experiment(
        "costs",
        "Four convex costs (|d|, |d|^2, |d|^4, max |d_i|) of randomly paired points before and after one rectification, on "
        "five pairs of toy sets: with the neighbour field, which needs no training, and with a perceptron of 2 x 64.",
        points.convex_costs,
        (
            Claim(
                "No convex cost rises (neighbour field)", "neighbours_worst_ratio", "worst of 20 ratios", "at most", 1.0
            ),
            Claim("No convex cost rises (network)", "network_worst_ratio", "worst of 20 ratios", "at most", 1.0),
        ),
    ),
    Experiment(
        "reflow",
        "Noise to the ring of eight modes: a flow (perceptron of 3 x 128, 2,000 Adam steps of batch 256), two reflow rounds "
        "on 10,000 of the flow's own pairs (100 midpoint steps) for as many steps, and students distilled from the first "
        "round's flow to 1, 2 and 4 steps. 2-Wasserstein distances of 1,000 points, exact; the floor is that of two fresh "
        "data sets.",
        points.reflow,
        (
            Claim("Reflow straightens", "straighter", "S before / after", "at least", 20),
            Claim(
                "One step suffices after reflow",
                "one_step_gain",
                "one-step distance before / after",
                "at least",
                4,
                "FID at one step, CIFAR-10: 378 before, 12.21 after",
            ),
            Claim(
                "Crossing and curvature over all rounds stay below the first cost",
                "sum_over_bound",
                "sum of V + S over three flows / E|X1 - X0|^2",
                "at most",
                1.0,
            ),
            Claim(
                "Distillation to k steps does not harm",
                "distilled_worst_distance_ratio",
                "worst distance to the data over k = 1, 2, 4, distilled / plain",
                "at most",
                1.0,
                "FID 12.21 to 4.85 (k = 1)",
            ),
            Claim(
                "Distilled steps end nearer to where the flow leads",
                "distilled_worst_error_ratio",
                "worst squared distance to the solved flow's ends over k = 1, 2, 4, distilled / plain",
                "at most",
                1.0,
            ),
        ),
        pictures={
            "ring-1.png": "Before reflow: paths of 200 points (seed 0).",
            "ring-2.png": "After one reflow round: the same starts.",
            "ring-3.png": "After two.",
        },
    ),
    Experiment(
        "other-paths",
        "The ring again, on the linear, VP and sub-VP paths: same network, data, times and 4,000 steps; and the exact VP "
        "flow of three modes moved to the linear path. What one step gives is no sample on any of the paths: the linear "
        "flow carries everything to the mean of the data, the curved ones hardly move the noise, which happens to lie "
        "nearer.",
        points.other_paths,
        (
            Claim(
                "Linear is best in one step",
                "linear_over_best_curved_1",
                "distance, linear / best of VP and sub-VP",
                "at most",
                1.0,
            ),
            Claim(
                "Linear is best in four steps",
                "linear_over_best_curved_4",
                "distance, linear / best of VP and sub-VP",
                "at most",
                1.0,
            ),
            Claim(
                "All paths agree when solved finely",
                "worst_over_best_100",
                "distance at 100 steps, worst / best of the three",
                "at most",
                1.5,
                "FID 2.58 (linear), 3.93 (VP), 3.16 (sub-VP) by RK45",
            ),
            Claim(
                "A change of path keeps the coupling", "conversion_error", "largest difference of ends", "at most", 1e-3
            ),
        ),
    ),
    Experiment(
        "one-step-transfer",
        "Eight modes to two moons, a flow and one reflow round on 10,000 of its pairs (4,000 steps): one Euler step against "
        "a hundred.",
        points.one_step_transfer,
        (
            Claim(
                "After reflow one step transfers as well as a hundred",
                "2_rectified_ratio",
                "distance, 1 step / 100 steps",
                "at most",
                1.3,
            ),
            Claim("Before it does not", "1_rectified_ratio", "distance, 1 step / 100 steps", "at least", 3.0),
        ),
    ),
    Experiment(
        "styles",
        "Images: plain digits to digits of less contrast under a checkerboard, learned from disjoint sets without pairs, "
        "with the plain loss and with the feature-Jacobian loss (features of a classifier that tells the two sets apart). A "
        "U-Net, 1,200 Adam steps of batch 64; a judge trained on styled digits reads the digit, another one the style.",
        styles.style_transfer,
        (
            Claim("The plain loss takes on the style", "plain_style_taken", "share judged styled", "at least", 0.9),
            Claim("So does the feature loss", "features_style_taken", "share judged styled", "at least", 0.9),
            Claim(
                "The feature loss keeps more of the content",
                "kept_gain",
                "share of digits kept, feature loss - plain loss",
                "at least",
                0.0,
            ),
        ),
        pictures={
            "styles.png": "Rows: plain digits; carried over with the plain loss; with the feature loss; the true "
            "style on the same digits (seed 0)."
        },
    ),
    Experiment(
        "digits",
        "Images: 8x8 digits with labels, a U-Net of 0.6 M parameters. A flow (600 Adam steps of batch 128), one reflow "
        "round (500 steps on 8,192 pairs), and students distilled from that to one step (500 steps on 8,192 pairs) with the "
        "squared loss, with the gradient pyramid (a surrogate for LPIPS without learned features) and with features of a "
        "classifier of these digits. Frechet distance of 2,000 samples in features of another classifier, trained from "
        "another seed.",
        digits.one_step_digits,
        (
            Claim(
                "Reflow makes one step good",
                "reflow_gain",
                "one-step Frechet distance before / after",
                "at least",
                5,
                "FID 378 to 12.21 (CIFAR-10)",
            ),
            Claim(
                "Reflow costs some quality when solved finely",
                "fine_after_over_before",
                "Frechet distance at 50 steps, after / before",
                "at least",
                1.0,
                "FID 2.58 to 3.36 by RK45",
            ),
            Claim(
                "Distillation improves the one step further",
                "distilled_over_reflow",
                "one-step Frechet distance, distilled (squared) / plain",
                "at most",
                1.0,
                "FID 12.21 to 4.85",
            ),
            Claim(
                "A perceptual loss distils better: gradient pyramid",
                "gradients_over_squared",
                "one-step Frechet distance, perceptual / squared",
                "at most",
                1.0,
                "LPIPS is the published choice for k = 1",
            ),
            Claim(
                "A perceptual loss distils better: classifier features",
                "classifier_over_squared",
                "one-step Frechet distance, perceptual / squared",
                "at most",
                1.0,
                "LPIPS is the published choice for k = 1",
            ),
        ),
    ),
    Experiment(
        "domain-adaptation",
        "A perceptron learns clean digits; other digits come inverted, blurred and rotated by 25 degrees, and their hidden "
        "features are carried to those of the clean ones without labels, by CORAL and by rectified flows (independent and "
        "minibatch-optimal coupling). With the classifier as it is an inverted digit is the opposite of itself, accuracy "
        "falls below chance and no map recovers it; the figures with the prefix polarity are of a classifier whose clean "
        "digits were inverted at random, an easier experiment that was added after this failure had been seen on other "
        "seeds. Settings were chosen on seeds 100 to 102, more of them for the flows than for CORAL.",
        adaptation.domain_adaptation,
        (
            Claim(
                "The flow closes a third of the gap",
                "gap_closed_flow",
                "(after - before) / (clean - before)",
                "at least",
                1 / 3,
                "OfficeHome 69.2 (none 66.5, CORAL 68.7)",
            ),
            Claim(
                "The same, classifier trained with random polarity",
                "polarity_gap_closed_flow",
                "(after - before) / (clean - before)",
                "at least",
                1 / 3,
            ),
            Claim(
                "The same, with minibatch-optimal coupling",
                "polarity_gap_closed_flow_ot",
                "(after - before) / (clean - before)",
                "at least",
                1 / 3,
            ),
            Claim(
                "That flow beats CORAL",
                "polarity_flow_ot_over_coral",
                "accuracy, flow - CORAL",
                "at least",
                0.0,
                "69.2 against 68.7; DomainNet 41.4 against 41.5",
            ),
        ),
        seeds=5,
    ),
)
