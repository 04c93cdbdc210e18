//! Medians, ratios of paired values, and intervals that assume nothing about how values are distributed.

use schemars::JsonSchema;
use serde::Serialize;

/// Probability that all intervals of a report together contain the true values.
pub(crate) const CONFIDENCE: f64 = 0.95;

/// Ends of an interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, JsonSchema)]
pub(crate) struct Interval {
    /// Lower end.
    pub(crate) low: f64,
    /// Upper end.
    pub(crate) high: f64,
}

impl Interval {
    /// Returns the order-statistic interval of the median of `values`, which fails with a probability of at
    /// most `1 - CONFIDENCE`; `None` if there are fewer than six values.
    pub(crate) fn of_median(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        // The number of values below the median is binomial.
        let halves = 0.5_f64.powi(i32::try_from(sorted.len()).ok()?);
        let mut binomial = halves;
        let chances = (0..sorted.len()).map(|below| {
            let chance = binomial;
            binomial *= (sorted.len() - below) as f64 / (below + 1) as f64;
            chance
        });
        Self::between(&sorted, cut(chances, 1.0 - CONFIDENCE)?)
    }

    /// Leaves out `cut` values at each end.
    fn between(sorted: &[f64], cut: usize) -> Option<Self> {
        let high = sorted.len().checked_sub(cut + 1)?;
        Some(Self { low: *sorted.get(cut)?, high: sorted[high] })
    }

    /// Returns whether the whole interval lies within `margin` of 1, up and down by the same factor.
    pub(crate) fn is_within(&self, margin: f64) -> bool {
        self.low >= 1.0 / (1.0 + margin) && self.high <= 1.0 + margin
    }

    /// Returns whether 1 is outside of the interval.
    pub(crate) fn excludes_one(&self) -> bool {
        self.low > 1.0 || self.high < 1.0
    }
}

/// Returns the ratio of paired values, from their logarithms: the Hodges-Lehmann estimate, and the interval
/// of Wilcoxon's signed-rank test at level `alpha`. Without pairs the ratio is 1. With fewer than
/// [`fewest_pairs`] there is no interval.
///
/// The interval is exact if pairs are independent and the logarithm of a pair is as likely to be `d + x` as
/// `d - x` around the true `d`. For modes that do not differ, a schedule that draws the order of each round
/// at random ensures this.
pub(crate) fn ratio(logs: &[f64], alpha: f64) -> (f64, Option<Interval>) {
    let mut averages: Vec<f64> = Vec::with_capacity(logs.len() * (logs.len() + 1) / 2);
    for (at, one) in logs.iter().enumerate() {
        averages.extend(logs[at..].iter().map(|other| f64::midpoint(*one, *other)));
    }
    averages.sort_by(f64::total_cmp);
    let interval = cut(signed_rank(logs.len()).into_iter(), alpha)
        .and_then(|cut| Interval::between(&averages, cut))
        .map(|ends| Interval { low: ends.low.exp(), high: ends.high.exp() });
    (median_of_sorted(&averages).unwrap_or(0.0).exp(), interval)
}

/// Fewest pairs that give an interval at level `alpha`: all of *n* pairs lie on one side with probability
/// 2^(1-n).
pub(crate) fn fewest_pairs(alpha: f64) -> usize {
    (1.0 - alpha.log2()).ceil() as usize
}

/// Returns how many values can be left out at each end at level `alpha`, where `chances` are the
/// probabilities of 0, 1, … of them; `None` if even the whole range is too narrow.
fn cut(chances: impl Iterator<Item = f64>, alpha: f64) -> Option<usize> {
    let mut sum = 0.0;
    let fitting = chances.take_while(|chance| {
        sum += chance;
        sum <= alpha / 2.0
    });
    fitting.count().checked_sub(1)
}

/// Returns the probabilities of the rank sums 0, 1, … of `pairs` pairs, each of which counts with probability
/// 1/2.
fn signed_rank(pairs: usize) -> Vec<f64> {
    let mut chances = vec![0.0; pairs * (pairs + 1) / 2 + 1];
    chances[0] = 1.0;
    for rank in 1..=pairs {
        for sum in (0..chances.len()).rev() {
            let with = if sum >= rank { chances[sum - rank] } else { 0.0 };
            chances[sum] = f64::midpoint(chances[sum], with);
        }
    }
    chances
}

/// Median; `None` without values.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    median_of_sorted(&sorted)
}

fn median_of_sorted(sorted: &[f64]) -> Option<f64> {
    let high = *sorted.get(sorted.len() / 2)?;
    Some(if sorted.len() % 2 == 1 { high } else { f64::midpoint(sorted[sorted.len() / 2 - 1], high) })
}

/// Random numbers (`SplitMix64`) from a seed that is stored with the results.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number from 0 (inclusive) to 1 (exclusive).
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Shuffles `items`. Each order is equally likely.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, (self.unit() * (last + 1) as f64) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    /// Checks against tables of the binomial distribution: the 95 % interval of six values is their range,
    /// that of nine leaves out one at each end, that of 20 leaves out five.
    #[test]
    fn the_interval_of_a_median_is_between_two_of_the_values() {
        let values = |n: u32| (1..=n).map(f64::from).collect::<Vec<_>>();
        assert_eq!(Interval::of_median(&values(5)), None);
        assert_eq!(Interval::of_median(&values(6)), Some(Interval { low: 1.0, high: 6.0 }));
        assert_eq!(Interval::of_median(&values(9)), Some(Interval { low: 2.0, high: 8.0 }));
        assert_eq!(Interval::of_median(&values(20)), Some(Interval { low: 6.0, high: 15.0 }));
    }

    /// Checks against tables of the signed-rank test: at 5 %, two-sided, the critical value is 0 for 6 pairs,
    /// 8 for 10, and 52 for 20.
    #[test]
    fn the_interval_of_a_ratio_is_that_of_the_signed_rank_test() {
        for (pairs, critical) in [(6, 0), (10, 8), (20, 52)] {
            assert_eq!(cut(signed_rank(pairs).into_iter(), 0.05), Some(critical), "{pairs}");
        }
        assert_eq!(cut(signed_rank(5).into_iter(), 0.05), None);
        assert_eq!((fewest_pairs(0.05), fewest_pairs(0.05 / 60.0)), (6, 12));
        let six = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6];
        let (estimate, interval) = ratio(&six, 0.05);
        assert!((estimate.ln() - 0.35).abs() < 1e-12);
        let interval = interval.unwrap();
        assert!((interval.low.ln() - 0.1).abs() < 1e-12 && (interval.high.ln() - 0.6).abs() < 1e-12);
        assert_eq!(ratio(&six, 0.01).1, None);
        assert_eq!(ratio(&[], 0.05), (1.0, None));
    }

    #[test]
    fn margins_reach_as_far_down_as_up() {
        let within = |low, high| Interval { low, high }.is_within(0.25);
        assert!(within(0.8, 1.25) && !within(0.79, 1.0) && !within(1.0, 1.26));
        assert!(Interval { low: 1.01, high: 2.0 }.excludes_one());
        assert!(!Interval { low: 1.0, high: 2.0 }.excludes_one());
    }

    #[test]
    fn each_order_comes_equally_often() {
        let (mut random, mut seen) = (Random(7), std::collections::BTreeMap::new());
        for _ in 0..60_000 {
            let mut order = [0, 1, 2, 3];
            random.shuffle(&mut order);
            *seen.entry(order).or_insert(0) += 1;
        }
        assert_eq!(seen.len(), 24);
        assert!(seen.values().all(|count| (2300..2700).contains(count)), "{seen:?}");
    }
}
