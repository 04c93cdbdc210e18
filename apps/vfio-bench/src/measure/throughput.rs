//! Throughput at a stated loss: the highest load of which no more than a given fraction is lost (RFC 2544,
//! section 26.1). With a loss above 0, the successors of RFC 2544 call this the partial drop rate.

use std::time::Duration;

use vireo_eal::Result;
use vireo_pktgen::generator::{Outcome, Stream};

use crate::record::{Throughput, Trial};

/// Factor by which the load rises or falls until one trial passes and one fails.
const STRIDE: f64 = 1.5;
/// The search ends when a load passes and another, at most this factor higher, fails.
const RESOLUTION: f64 = 1.05;
/// Number of trials after which the search ends in any case.
const TRIALS: usize = 16;
/// A generator that sends less than this fraction of a load cannot keep up with it.
const KEPT_UP: f64 = 0.98;
/// Frames in flight count as lost if nothing arrives for this time.
const LOST: Duration = Duration::from_millis(250);

/// Returns `stream` with frames of `frame` bytes, sent when they are due, whatever has returned.
pub(super) fn open_loop(stream: &Stream, frame: usize) -> Stream {
    Stream { sizes: frame..=frame, window: u64::MAX, patience: LOST, ..stream.clone() }
}

/// Returns the result of offering `load` frames per second for `time`.
pub(super) fn trial(load: f64, time: Duration, outcome: &Outcome) -> Trial {
    Trial {
        load,
        pps: outcome.sent as f64 / time.as_secs_f64(),
        sent: outcome.sent,
        received: outcome.received,
    }
}

/// Searches from `begin` frames per second, up or down until one load passes and another fails, then between
/// the two.
pub(super) fn search(
    frame: usize,
    begin: f64,
    loss: f64,
    mut try_load: impl FnMut(f64) -> Result<Trial>,
) -> Result<Throughput> {
    let (mut passed, mut failed) = (None::<f64>, None::<f64>);
    let mut found = Throughput { frame, pps: 0.0, at_least: false, trials: Vec::new() };
    let mut fell_short = false;
    while found.trials.len() < TRIALS {
        let load = match (passed, failed) {
            (None, None) => begin.max(1.0),
            (Some(low), None) => low * STRIDE,
            (None, Some(high)) => high / STRIDE,
            (Some(low), Some(high)) if high / low > RESOLUTION => (low * high).sqrt(),
            _ => break,
        };
        let trial = try_load(load)?;
        let (passes, short) = (trial.loss() <= loss, trial.pps < KEPT_UP * load);
        found.trials.push(trial);
        if !passes {
            failed = Some(load);
            continue;
        }
        found.pps = found.pps.max(trial.pps);
        if !short {
            passed = Some(load);
        } else if fell_short {
            found.at_least = true;
            break;
        }
        // Falling short once may be a stall, so the same load is tried again.
        fell_short = short;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A forwarder that loses what exceeds `capacity`, and a generator that sends at most `most`.
    fn found(capacity: f64, most: f64, begin: f64, loss: f64) -> Throughput {
        search(60, begin, loss, |load| {
            let pps = load.min(most);
            let (sent, received) = (pps as u64, pps.min(capacity) as u64);
            Ok(Trial { load, pps, sent, received })
        })
        .unwrap()
    }

    #[test]
    fn the_highest_load_without_loss_is_found_from_above_and_from_below() {
        for begin in [1e4, 9e4, 1e5, 1.2e5, 1e6] {
            let found = found(1e5, 1e9, begin, 0.0);
            assert!((1e5 / RESOLUTION..=1e5).contains(&found.pps), "{found:?}");
            assert!(!found.at_least && found.trials.len() < TRIALS);
        }
    }

    #[test]
    fn a_loss_that_is_allowed_is_no_failure() {
        let found = found(1e5, 1e9, 1e5, 0.2);
        assert!((1.25e5 / RESOLUTION..=1.25e5).contains(&found.pps), "{found:?}");
    }

    #[test]
    fn a_generator_that_cannot_keep_up_gives_a_lower_bound() {
        let found = found(1e5, 5e4, 4e4, 0.0);
        assert!(found.at_least && found.pps == 5e4, "{found:?}");
    }

    #[test]
    fn one_stall_of_the_generator_is_no_limit() {
        let mut trials = 0;
        let found = search(60, 1e5, 0.0, |load| {
            trials += 1;
            let pps = if trials == 2 { 1e3 } else { load };
            Ok(Trial { load, pps, sent: pps as u64, received: pps.min(1e5) as u64 })
        });
        let found = found.unwrap();
        assert!(!found.at_least && (1e5 / RESOLUTION..=1e5).contains(&found.pps), "{found:?}");
    }

    #[test]
    fn where_everything_is_lost_there_is_no_throughput() {
        let found = found(0.0, 1e9, 1e5, 0.0);
        assert_eq!((found.pps, found.at_least, found.trials.len()), (0.0, false, TRIALS));
    }
}
