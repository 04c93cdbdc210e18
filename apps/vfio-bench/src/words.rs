//! The comparison in plain English, and numbers as a reader wants them.

use crate::compare::{Metric, Pair, Verdict};
use crate::record::Environment;
use crate::stats::{FEWEST_PAIRS, Interval};

/// Three significant digits.
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

/// Digits in groups of three, with thin marks that survive copying.
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

/// Size in the largest unit that divides it.
pub(crate) fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let fits = units.iter().find(|(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift));
    fits.map_or_else(|| format!("{bytes} B"), |(shift, unit)| format!("{} {unit}", bytes >> shift))
}

/// Scale and name of the unit in which rates up to `max` per second read best.
pub(crate) fn rate_unit(max: f64) -> (f64, &'static str) {
    match max {
        m if m >= 2e6 => (1e6, "Mpps"),
        m if m >= 2e3 => (1e3, "kpps"),
        _ => (1.0, "pps"),
    }
}

/// A share as percentage without the sign of per cent.
pub(crate) fn percent(share: f64) -> String {
    match share.abs() * 100.0 {
        p if p < 0.0995 => format!("{p:.2}"),
        p if p < 9.95 => format!("{p:.1}"),
        p => format!("{p:.0}"),
    }
}

/// A ratio as signed change: "+1.3", "−0.4", "0".
pub(crate) fn change(ratio: f64) -> String {
    match ratio - 1.0 {
        c if c.abs() < 0.000_05 => "0".to_owned(),
        c => format!("{}{}", if c < 0.0 { '−' } else { '+' }, percent(c)),
    }
}

/// "a, b and c".
pub(crate) fn list<S: AsRef<str>>(names: &[S]) -> String {
    let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    match names.split_last() {
        Some((last, [])) => (*last).to_owned(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => String::new(),
    }
}

/// Without repetition, in their order.
pub(crate) fn distinct<T: PartialEq>(items: impl Iterator<Item = T>) -> Vec<T> {
    items.fold(Vec::new(), |mut seen, item| {
        if !seen.contains(&item) {
            seen.push(item);
        }
        seen
    })
}

impl Metric {
    /// Heading over the sentences of this metric.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::ForwardPps => "Forwarding",
            Self::LatencyP50 => "Latency",
            Self::Attach => "Attach",
            Self::Map => "DMA map",
            Self::FirstPacket => "First packet",
            Self::Doorbells => "Doorbells",
        }
    }

    /// The quantity within a sentence.
    pub(crate) fn noun(self) -> &'static str {
        match self {
            Self::ForwardPps => "forwarding rate",
            Self::LatencyP50 => "median latency",
            Self::Attach => "time to open, bind and attach",
            Self::Map => "DMA-map time",
            Self::FirstPacket => "time to the first packet",
            Self::Doorbells => "doorbells per packet",
        }
    }

    fn differs(self, mode: &str, baseline: &str, ratio: &Interval) -> String {
        let (by, interval) = (amount(ratio.median), bounds(ratio));
        let clause = match (self, ratio.median >= 2.0) {
            (Self::ForwardPps, true) => format!("{mode} forwards {by} as fast as {baseline}"),
            (Self::LatencyP50, true) => format!("the median latency of {mode} is {by} that of {baseline}"),
            (Self::Doorbells, true) => format!("{mode} rings {by} as often for a packet as {baseline}"),
            (_, true) => format!("{mode} takes {by} as long {} as {baseline}", self.task()),
            _ => self.comparative(mode, baseline, &by, ratio.median > 1.0),
        };
        format!("{clause} (95 % interval {interval})")
    }

    fn task(self) -> &'static str {
        match self {
            Self::ForwardPps => "to forward",
            Self::LatencyP50 => "to answer",
            Self::Attach => "to open, bind and attach",
            Self::Map => "to map memory",
            Self::FirstPacket => "to forward its first packet",
            Self::Doorbells => "to ring",
        }
    }

    /// "cdev forwards 2 % faster than container", or without `by`.
    fn comparative(self, mode: &str, baseline: &str, by: &str, up: bool) -> String {
        let by = if by.is_empty() { String::new() } else { format!("{by} ") };
        let word = |more, less| if up { more } else { less };
        match self {
            Self::ForwardPps => {
                format!("{mode} forwards {by}{} than {baseline}", word("faster", "slower"))
            }
            Self::LatencyP50 => {
                let word = word("higher", "lower");
                format!("the median latency of {mode} is {by}{word} than that of {baseline}")
            }
            Self::Doorbells => {
                format!("{mode} rings {by}{} often for a packet than {baseline}", word("more", "less"))
            }
            _ => {
                format!("{mode} takes {by}{} time {} than {baseline}", word("more", "less"), self.task())
            }
        }
    }
}

/// A change without its direction: "2.7 %", "5.6 times".
fn amount(ratio: f64) -> String {
    if ratio >= 2.0 { format!("{ratio:.1} times") } else { format!("{} %", percent(ratio - 1.0)) }
}

/// The interval in the unit of [`amount`].
fn bounds(ratio: &Interval) -> String {
    if ratio.median >= 2.0 {
        return format!("{:.1} to {:.1} times", ratio.low, ratio.high);
    }
    let (near, far) = if ratio.median > 1.0 { (ratio.low, ratio.high) } else { (ratio.high, ratio.low) };
    format!("{} to {} %", percent(near - 1.0), percent(far - 1.0))
}

/// One sentence over several NICs on which the same modes differ in the same direction.
pub(crate) fn differ(pairs: &[&Pair]) -> String {
    let Pair { metric, mode, baseline, ratio, .. } = pairs[0];
    let each = pairs.iter().enumerate().map(|(i, p)| {
        let (by, interval) = (amount(p.ratio.median), bounds(&p.ratio));
        let (by, interval) = (by.replace(" times", "-fold"), interval.replace(" times", ""));
        format!("{by} on {} ({}{interval})", p.nic, if i == 0 { "95 % interval " } else { "" })
    });
    let clause = metric.comparative(mode, baseline, "", ratio.median > 1.0);
    format!("{clause}: {}", list(&each.collect::<Vec<_>>()))
}

/// What may be said of one pair.
pub(crate) fn sentence(pair: &Pair) -> String {
    let Pair { nic, baseline, mode, metric, ratio, .. } = pair;
    if pair.verdict == Verdict::Differs {
        return format!("{nic}: {}", metric.differs(mode, baseline, ratio));
    }
    let measured = format!(
        "{} was {:.3} times that of {baseline} (95 % interval {:.3} to {:.3})",
        metric.noun(),
        ratio.median,
        ratio.low,
        ratio.high
    );
    match pair.verdict {
        Verdict::NotInterleaved => {
            let apart = if pair.boots[0] == pair.boots[1] { "in other rounds" } else { "in another boot" };
            format!(
                "{nic}: {mode} ran {apart}, not interleaved with {baseline}, so this is no verdict: its {measured}"
            )
        }
        verdict => format!("{nic}: {}", undecided(verdict, *metric, &[baseline, mode], &[pair])),
    }
}

/// One sentence over several pairs that got the same verdict.
pub(crate) fn undecided(verdict: Verdict, metric: Metric, modes: &[&str], pairs: &[&Pair]) -> String {
    let (noun, modes) = (metric.noun(), list(modes));
    match verdict {
        Verdict::TooFewPairs => {
            let n = pairs.iter().map(|p| p.pairs).min().unwrap_or(0);
            let (s, verb) = if n == 1 { ("", "is") } else { ("s", "are") };
            format!(
                "{noun} of {modes} not judged: {n} pair{s} {verb} too few for a 95 % interval, which needs {FEWEST_PAIRS}"
            )
        }
        Verdict::NoNoiseFloor => {
            format!("{noun} of {modes} not judged: no noise floor, which needs {FEWEST_PAIRS} A/A pairs")
        }
        _ => {
            let floors = pairs.iter().filter_map(|pair| pair.noise);
            let low = percent(floors.clone().fold(f64::INFINITY, f64::min));
            let high = percent(floors.fold(0.0, f64::max));
            let noise = if low == high { format!("±{high}") } else { format!("±{low} to ±{high}") };
            format!("no difference in {noun} seen between {modes} at this noise (A/A {noise} %)")
        }
    }
}

/// Facts of all boots by key: one value where the boots agree, else one per boot.
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
