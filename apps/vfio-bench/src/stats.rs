//! Medians and their uncertainty.

use serde::Serialize;

/// Fewest pairs that can carry a 95 % interval of a median: the whole range of *n* values covers it with
/// probability 1 - 2^(1-n), and that passes 95 % at six.
pub(crate) const FEWEST_PAIRS: usize = 6;

const RESAMPLES: usize = 2000;

/// A median and its bootstrap 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Interval {
    /// Median of the values.
    pub(crate) median: f64,
    /// Lower end.
    pub(crate) low: f64,
    /// Upper end.
    pub(crate) high: f64,
}

impl Interval {
    /// Interval of the median of `values`; `None` without values.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut rng = SplitMix64(SEED);
        Some(Self::between(median(values)?, || rng.median_of_resample(values)))
    }

    /// Interval of the ratio of the medians of two unpaired samples.
    pub(crate) fn of_unpaired(a: &[f64], b: &[f64]) -> Option<Self> {
        let mut rng = SplitMix64(SEED);
        let ratio = median(b)? / median(a)?;
        Some(Self::between(ratio, || rng.median_of_resample(b) / rng.median_of_resample(a)))
    }

    fn between(median: f64, mut resample: impl FnMut() -> f64) -> Self {
        let mut medians: Vec<f64> = (0..RESAMPLES).map(|_| resample()).collect();
        medians.sort_by(f64::total_cmp);
        Self { median, low: medians[RESAMPLES / 40], high: medians[RESAMPLES - 1 - RESAMPLES / 40] }
    }

    /// How far the interval reaches from "no change".
    pub(crate) fn reach(&self) -> f64 {
        (self.low - 1.0).abs().max((self.high - 1.0).abs())
    }

    /// Whether "no change" is outside of the interval.
    pub(crate) fn excludes_one(&self) -> bool {
        self.low > 1.0 || self.high < 1.0
    }
}

/// Median; `None` without values.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let high = *sorted.get(sorted.len() / 2)?;
    Some(if sorted.len() % 2 == 1 { high } else { f64::midpoint(sorted[sorted.len() / 2 - 1], high) })
}

// Fixed, so that the same recordings give the same report.
const SEED: u64 = 0x5eed_0f5a_fe0f_5eed;

struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn median_of_resample(&mut self, values: &[f64]) -> f64 {
        let n = values.len() as u64;
        let picked: Vec<f64> = values.iter().map(|_| values[(self.next() % n) as usize]).collect();
        median(&picked).unwrap_or(f64::NAN)
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

    #[test]
    fn the_interval_holds_the_median_and_is_the_same_every_time() {
        let values: Vec<f64> = (0..15).map(|i| 1.0 + f64::from(i) / 100.0).collect();
        let interval = Interval::of(&values).unwrap();
        assert_eq!(interval.median, 1.07);
        assert!(interval.low > 1.0 && interval.low < 1.07, "{interval:?}");
        assert!(interval.high < 1.14 && interval.high > 1.07, "{interval:?}");
        assert_eq!(Interval::of(&values), Some(interval));
    }

    #[test]
    fn an_interval_of_one_value_is_that_value() {
        assert_eq!(Interval::of(&[2.0]), Some(Interval { median: 2.0, low: 2.0, high: 2.0 }));
        assert_eq!(Interval::of_unpaired(&[2.0], &[3.0]).unwrap().median, 1.5);
        assert_eq!(Interval::of(&[]), None);
    }

    #[test]
    fn reach_is_the_farther_end() {
        let interval = Interval { median: 1.0, low: 0.97, high: 1.02 };
        assert!((interval.reach() - 0.03).abs() < 1e-12 && !interval.excludes_one());
        assert!(Interval { median: 1.1, low: 1.01, high: 1.2 }.excludes_one());
    }
}
