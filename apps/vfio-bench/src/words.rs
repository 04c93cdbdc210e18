//! The comparison in plain English, and numbers as readers want them.

use crate::compare::{Comparison, Family, Metric, Pair, Row, ThroughputRow, Verdict};
use crate::record::Environment;
use crate::reference::Reference;
use crate::stats::Interval;

/// Formats a number with three significant digits.
pub(crate) fn three(x: f64) -> String {
    match x.abs() {
        0.0 => "0".to_owned(),
        a if a < 0.000_95 => "<0.001".to_owned(),
        a if a < 0.0995 => format!("{x:.3}"),
        a if a < 9.995 => format!("{x:.2}"),
        a if a < 99.95 => format!("{x:.1}"),
        _ => thousands(x.round() as u64),
    }
}

/// Formats a number with its digits in groups of three, separated by commas, which survive copying.
pub(crate) fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Formats a size in the largest unit that divides it.
pub(crate) fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let fits = units.iter().find(|(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift));
    fits.map_or_else(|| format!("{bytes} B"), |(shift, unit)| format!("{} {unit}", bytes >> shift))
}

/// Scale and name of the unit in which rates up to `max` per second are easiest to read.
pub(crate) fn rate_unit(max: f64) -> (f64, &'static str) {
    match max {
        m if m >= 2e6 => (1e6, "Mpps"),
        m if m >= 2e3 => (1e3, "kpps"),
        _ => (1.0, "pps"),
    }
}

/// Formats a throughput in units of `scale` per second. `≥` means that it is a lower bound in some rounds.
pub(crate) fn throughput(row: &ThroughputRow, scale: f64) -> String {
    format!("{}{}", if row.at_least > 0 { "≥ " } else { "" }, three(row.pps / scale))
}

/// Formats doorbells per packet, or a dash for a reference, which does not count them.
pub(crate) fn doorbells(row: &Row) -> String {
    if row.reference { "–".to_owned() } else { three(row.doorbells_per_packet) }
}

impl Comparison {
    /// Describes the references, and says which of them count their losses wrongly.
    pub(crate) fn describe_references(&self) -> Vec<String> {
        let described = distinct(self.references.iter().map(|row| row.mode.as_str())).into_iter();
        let described = described.map(|name| format!("{name}: {}", Reference::describe(name)));
        let uncounted = self.references.iter().filter(|row| !row.balanced).map(|row| {
            let counts = match row.uncounted() {
                0 => "counts more losses than there were",
                _ => "does not count all of its losses",
            };
            format!(
                "{}, {}: {} sent, {} received, {} dropped, so {} {counts}",
                row.nic,
                row.label,
                thousands(row.sent),
                thousands(row.received),
                thousands(row.dropped),
                row.mode
            )
        });
        described.chain(uncounted).collect()
    }
}

/// Formats what a row lost: the losses by counter, and those that no counter has.
pub(crate) fn lost(row: &Row) -> String {
    let counted = row.drops.iter().filter(|(_, n)| **n > 0);
    let uncounted = Some(row.uncounted()).filter(|n| row.is_sound() && *n > 0);
    let counted = counted.map(|(name, n)| format!("{name} {}", thousands(*n)));
    let uncounted = uncounted.map(|n| format!("{} not counted", thousands(n)));
    counted.chain(uncounted).collect::<Vec<_>>().join(", ")
}

/// Formats a share as a percentage, without the percent sign.
pub(crate) fn percent(share: f64) -> String {
    match share.abs() * 100.0 {
        p if p < 0.0995 => format!("{p:.2}"),
        p if p < 9.95 => format!("{p:.1}"),
        p => format!("{p:.0}"),
    }
}

/// Converts a share that a user chose to a percentage: "5", "2.5".
pub(crate) fn round(share: f64) -> f64 {
    (share * 1e4).round() / 100.0
}

/// Formats a ratio as a signed change: "+1.3", "−0.4", "0".
pub(crate) fn change(ratio: f64) -> String {
    match ratio - 1.0 {
        c if c.abs() < 0.000_05 => "0".to_owned(),
        c => format!("{}{}", if c < 0.0 { '−' } else { '+' }, percent(c)),
    }
}

/// Joins names: "a, b and c".
pub(crate) fn list<S: AsRef<str>>(names: &[S]) -> String {
    let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    match names.split_last() {
        Some((last, [])) => (*last).to_owned(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => String::new(),
    }
}

/// Removes repetitions and keeps the order.
pub(crate) fn distinct<T: PartialEq>(items: impl Iterator<Item = T>) -> Vec<T> {
    items.fold(Vec::new(), |mut seen, item| {
        if !seen.contains(&item) {
            seen.push(item);
        }
        seen
    })
}

impl Metric {
    /// Heading of the sentences on this metric.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::ForwardPps => "Forwarding",
            Self::Throughput => "Throughput",
            Self::LatencyP50 => "Latency",
            Self::Doorbells => "Doorbells",
            Self::Attach => "Attach",
            Self::FirstPacket => "First packet",
            Self::Map => "DMA map",
            Self::Unmap => "DMA unmap",
        }
    }

    /// Noun for the metric within a sentence.
    pub(crate) fn noun(self) -> &'static str {
        match self {
            Self::ForwardPps => "forwarding rate",
            Self::Throughput => "throughput",
            Self::LatencyP50 => "median latency",
            Self::Doorbells => "number of doorbells per packet",
            Self::Attach => "time to open, bind and attach",
            Self::FirstPacket => "time to the first packet",
            Self::Map => "time to map memory",
            Self::Unmap => "time to unmap memory",
        }
    }

    /// Returns whether a larger value is better.
    pub(crate) fn is_gain(self) -> bool {
        matches!(self, Self::ForwardPps | Self::Throughput)
    }
}

/// Formats a ratio as a share: "53.1 %", "7.02 times".
fn share(ratio: f64) -> String {
    if ratio >= 2.0 { format!("{} times", three(ratio)) } else { format!("{} %", three(ratio * 100.0)) }
}

/// Formats the interval of a share, in the unit of the share.
fn shares(ratio: f64, Interval { low, high }: Interval) -> String {
    if ratio >= 2.0 {
        format!("{} to {} times", three(low), three(high))
    } else {
        format!("{} to {} %", three(low * 100.0), three(high * 100.0))
    }
}

/// Formats an interval as the changes that it allows: "−3.1 to +4.0 %".
pub(crate) fn changes(Interval { low, high }: Interval) -> String {
    format!("{} to {} %", change(low), change(high))
}

/// Returns the sentence on one pair.
pub(crate) fn sentence(pair: &Pair, family: &Family) -> String {
    let Pair { subject, baseline, mode, metric, ratio, .. } = pair;
    let noun = metric.noun();
    match (pair.verdict, pair.interval) {
        (Verdict::NotInterleaved, _) => {
            let apart = if pair.boots[0] == pair.boots[1] { "in other rounds" } else { "in another boot" };
            let share = share(*ratio);
            format!(
                "{subject}: {mode} ran {apart} than {baseline}, so this is not a verdict: its {noun} was {share} of {baseline}'s"
            )
        }
        (Verdict::Differs, Some(_)) => format!("{subject}: {mode}'s {noun} is {}", of_baseline(pair, "")),
        (verdict, _) => format!("{subject}: {noun} {}", not_different(verdict, &[pair], family)),
    }
}

/// Formats a ratio with its baseline: "53.1 % of container's (52.0 to 54.2 %)".
fn of_baseline(pair: &Pair, on: &str) -> String {
    let interval =
        pair.interval.map_or(String::new(), |interval| format!(" ({})", shares(pair.ratio, interval)));
    format!("{} of {}'s{on}{interval}", share(pair.ratio), pair.baseline)
}

/// Returns one sentence on several subjects on which the same modes differ in the same direction.
pub(crate) fn differ(pairs: &[&Pair]) -> String {
    let each = pairs.iter().map(|pair| of_baseline(pair, &format!(" on {}", pair.subject)));
    let said = list(&each.collect::<Vec<_>>());
    pairs.first().map_or(String::new(), |pair| format!("{}'s {} is {said}", pair.mode, pair.metric.noun()))
}

/// Returns what the report says of pairs with the same verdict, unless they differ.
pub(crate) fn not_different(verdict: Verdict, pairs: &[&Pair], family: &Family) -> String {
    let modes = list(&distinct(pairs.iter().flat_map(|pair| [&pair.baseline, &pair.mode])));
    let ends = pairs.iter().filter_map(|pair| pair.interval);
    let widest = Interval {
        low: ends.clone().map(|interval| interval.low).fold(f64::INFINITY, f64::min),
        high: ends.map(|interval| interval.high).fold(0.0, f64::max),
    };
    match verdict {
        Verdict::Equivalent => {
            format!("of {modes} is the same within ±{} % ({})", round(family.margin), changes(widest))
        }
        Verdict::Undecided => format!("of {modes} is undecided ({} is possible)", changes(widest)),
        Verdict::NotComparable => {
            format!("of {modes} is not judged: in these rounds a mode also differed from itself")
        }
        Verdict::Censored => format!(
            "of {modes} is not judged: in some round the generator could not send more, or every load lost too much"
        ),
        _ => {
            let rounds = pairs.iter().map(|pair| pair.rounds).min().unwrap_or(0);
            let Family { comparisons, fewest_rounds, .. } = family;
            format!(
                "of {modes} is not judged: {rounds} round{}, but {comparisons} comparisons need {fewest_rounds}",
                if rounds == 1 { "" } else { "s" }
            )
        }
    }
}

/// Returns the facts of all boots by key: one value if the boots agree, otherwise one per boot.
pub(crate) fn shared_facts(boots: &[Environment]) -> Vec<(&str, Vec<&str>)> {
    let keys = distinct(boots.iter().flat_map(|boot| &boot.0).map(|(key, _)| key.as_str()));
    let fact = |key| {
        let mut values: Vec<&str> = boots.iter().map(|boot| boot.get(key).unwrap_or("–")).collect();
        if values.iter().all(|value| *value == values[0]) {
            values.truncate(1);
        }
        (key, values)
    };
    keys.into_iter().map(fact).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_as_a_reader_wants_them() {
        let texts = [0.0, 0.0004, 0.0123, 1.234, 9.996, 56.78, 999.6, 12345.6].map(three);
        assert_eq!(texts, ["0", "<0.001", "0.012", "1.23", "10.0", "56.8", "1,000", "12,346"]);
        assert_eq!([0, 999, 1000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0, 1 << 30, 3 << 20, 1000].map(size), ["0 B", "1 GiB", "3 MiB", "1000 B"]);
        assert_eq!([1.0131, 0.996, 1.0004, 1.00001, 3.0].map(change), ["+1.3", "−0.4", "+0.04", "0", "+200"]);
        assert_eq!(
            [&["a"][..], &["a", "b"], &["a", "b", "c"], &[]].map(list),
            ["a", "a and b", "a, b and c", ""]
        );
    }
}
