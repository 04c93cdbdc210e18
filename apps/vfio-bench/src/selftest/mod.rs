//! `selftest`: checks the whole path from recordings to claims, with simulated recordings whose truth is
//! known.

mod world;

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use vireo_eal::program::{self, note};
use vireo_eal::{Error, ErrorKind, Result};

use crate::compare::{Comparison, Verdict};
use crate::report::{MARGIN, write_json};
use crate::stats::{CONFIDENCE, Random};
use crate::words::{percent, round, thousands};
use world::World;

/// Check with simulated recordings how often a report makes a false claim
#[derive(Args, Debug)]
pub(crate) struct SelftestArgs {
    /// Number of reports on modes that do not differ
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    null: u32,
    /// Number of reports in which one mode differs by a known ratio
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    effects: u32,
    /// Seed of the simulation
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Also write the counts as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Results of the selftest.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Counts {
    null: Null,
    effects: Effects,
}

/// Results of reports on modes that do not differ.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Null {
    reports: u32,
    /// Comparisons per report.
    comparisons: usize,
    /// Reports that claim any difference.
    with_claims: u32,
}

/// Results of reports in which one mode differs, by the same factor in every metric except doorbells.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Effects {
    reports: u32,
    /// Comparisons of modes that differ.
    differences: u64,
    /// Differences that were found.
    found: u64,
    /// Differences of at least 20 % on machines with a spread of at most 5 %: the number found, and the
    /// total.
    plain: [u64; 2],
    /// Differences claimed with the wrong sign.
    wrong_sign: u64,
    /// Reports that claim a difference where there is none.
    with_false_claims: u32,
    /// Reports whose intervals all contain the truth.
    all_hold: u32,
    /// Comparisons called the same although they differ by more than the margin.
    wrongly_same: u64,
}

pub(crate) fn selftest(args: &SelftestArgs) -> Result<()> {
    let counts = Counts { null: null(args.null, args.seed), effects: effects(args.effects, args.seed) };
    program::print(&text(&counts))?;
    if let Some(path) = &args.json {
        write_json(path, &counts)?;
    }
    counts.fault().map_or(Ok(()), |fault| {
        Err(Error::new(ErrorKind::Protocol, "the reports do not meet their guarantees", fault))
    })
}

impl Counts {
    /// Returns the first promise that is not kept.
    fn fault(&self) -> Option<String> {
        let Self { null, effects } = self;
        let most = 1.0 - CONFIDENCE;
        let over = |count: u32, of: u32| f64::from(count) > most * f64::from(of);
        if over(null.with_claims, null.reports) {
            return Some(format!("{} of {} null reports claim a difference", null.with_claims, null.reports));
        }
        if over(effects.reports - effects.all_hold, effects.reports) {
            let failed = effects.reports - effects.all_hold;
            return Some(format!(
                "in {failed} of {} reports, an interval does not contain the true value",
                effects.reports
            ));
        }
        None
    }
}

fn null(reports: u32, seed: u64) -> Null {
    let mut counts = Null { reports, ..Null::default() };
    for number in 0..reports {
        let comparison =
            World::null(&mut Random(seed.wrapping_mul(2).wrapping_add(u64::from(number) << 32))).report();
        counts.comparisons = comparison.family.comparisons;
        let claims = comparison.pairs.iter().any(|pair| pair.verdict == Verdict::Differs);
        counts.with_claims += u32::from(claims);
        progress(number, reports, "without differences");
    }
    counts
}

fn effects(reports: u32, seed: u64) -> Effects {
    let mut counts = Effects { reports, ..Effects::default() };
    for number in 0..reports {
        let world =
            World::with_effect(&mut Random(seed.wrapping_mul(2).wrapping_add((u64::from(number) << 32) + 1)));
        let comparison = world.clone().report();
        counts.add(&world, &comparison);
        progress(number, reports, "with differences");
    }
    counts
}

impl Effects {
    fn add(&mut self, world: &World, comparison: &Comparison) {
        let (mut false_claim, mut all_hold) = (false, true);
        for pair in &comparison.pairs {
            let truth = world.ratio(pair);
            let differs = pair.verdict == Verdict::Differs;
            if truth == 1.0 {
                false_claim |= differs;
            } else {
                self.differences += 1;
                self.found += u64::from(differs);
                self.wrong_sign += u64::from(differs && (pair.ratio > 1.0) != (truth > 1.0));
                if world.is_quiet() && truth.ln().abs() >= 1.2_f64.ln() {
                    self.plain[0] += u64::from(differs);
                    self.plain[1] += 1;
                }
            }
            let beyond = truth.max(1.0 / truth) > 1.0 + MARGIN;
            self.wrongly_same += u64::from(pair.verdict == Verdict::Equivalent && beyond);
            // The ends are computed from logarithms, so a truth on the edge counts as contained.
            all_hold &= pair
                .interval
                .is_none_or(|ends| ends.low <= truth * (1.0 + 1e-9) && truth <= ends.high * (1.0 + 1e-9));
        }
        self.with_false_claims += u32::from(false_claim);
        self.all_hold += u32::from(all_hold);
    }
}

fn progress(number: u32, of: u32, what: &str) {
    if (number + 1).is_multiple_of(500) || number + 1 == of {
        note(&format!("{} of {} reports {what}", thousands(u64::from(number) + 1), thousands(u64::from(of))));
    }
}

fn text(Counts { null, effects }: &Counts) -> String {
    let share = |part: f64, whole: f64| percent(part / whole.max(1.0));
    let (nulls, reports) = (f64::from(null.reports), f64::from(effects.reports));
    format!(
        "{} reports of {} comparisons without any difference\n  \
           {} claim one: {} %, at most {} % allowed\n\
         {} reports with differences of 5 to 50 %\n  \
           {} with every interval correct: {} %, at least {} % guaranteed\n  \
           {} with a claim where there is no difference\n  \
           {} of {} differences found: {} %; {} of them with the wrong sign\n  \
           {} of {} differences of 20 % or more on quiet machines found: {} %\n  \
           {} called the same although they differ by more than the margin\n",
        thousands(null.reports.into()),
        null.comparisons,
        null.with_claims,
        share(null.with_claims.into(), nulls),
        round(1.0 - CONFIDENCE),
        thousands(effects.reports.into()),
        effects.all_hold,
        share(effects.all_hold.into(), reports),
        round(CONFIDENCE),
        effects.with_false_claims,
        thousands(effects.found),
        thousands(effects.differences),
        share(effects.found as f64, effects.differences as f64),
        effects.wrong_sign,
        thousands(effects.plain[0]),
        thousands(effects.plain[1]),
        share(effects.plain[0] as f64, effects.plain[1] as f64),
        effects.wrongly_same,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reports are few, so the limits leave room for chance. `vfio-bench selftest` makes enough of them
    /// to check the promise.
    #[test]
    fn reports_claim_what_is_so_and_hardly_anything_else() {
        let (null, effects) = (null(40, 1), effects(20, 1));
        assert!(null.comparisons > 50 && null.with_claims <= 5, "{null:?}");
        let Effects { plain: [found, all], wrong_sign, all_hold, .. } = effects;
        assert!(all > 20 && found * 10 >= all * 9 && wrong_sign == 0 && all_hold >= 16, "{effects:?}");
    }

    #[test]
    fn a_report_that_claims_too_often_is_a_fault() {
        let counts = |with_claims, all_hold| Counts {
            null: Null { reports: 100, comparisons: 60, with_claims },
            effects: Effects { reports: 100, all_hold, ..Effects::default() },
        };
        assert_eq!(counts(5, 95).fault(), None);
        assert!(counts(6, 95).fault().unwrap().starts_with("6 of 100 null reports"));
        assert!(counts(5, 94).fault().unwrap().starts_with("in 6 of 100 reports"));
    }
}
