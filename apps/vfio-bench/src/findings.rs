//! What the comparison found, in as few sentences as cover every pair of modes.

use crate::compare::{Comparison, Metric, Pair, Verdict};
use crate::words::{differ, distinct, list, undecided};

/// Sentences that cover every pair of modes, grouped under headings; equal verdicts share a sentence.
pub(crate) fn headlines(comparison: &Comparison) -> Vec<(&'static str, Vec<String>)> {
    let mut groups = Vec::new();
    for metric in Metric::ALL {
        let pairs = comparison.pairs.iter();
        let of_metric = pairs.filter(|p| p.metric == metric && p.verdict != Verdict::NotInterleaved);
        let sentences = sentences(&of_metric.collect::<Vec<_>>());
        if !sentences.is_empty() {
            groups.push((metric.title(), sentences));
        }
    }
    let apart = across(comparison);
    if !apart.is_empty() {
        groups.push(("Not interleaved", apart));
    }
    groups
}

/// Pairs that one sentence covers: the same modes with the same verdict on several NICs.
struct Finding<'a> {
    verdict: Verdict,
    /// Of a difference: whether the quantity is larger.
    up: bool,
    modes: Vec<&'a str>,
    nics: Vec<&'a str>,
    pairs: Vec<&'a Pair>,
}

fn sentences(pairs: &[&Pair]) -> Vec<String> {
    let mut findings: Vec<Finding<'_>> = Vec::new();
    for key in distinct(pairs.iter().map(|p| (p.nic.as_str(), p.boots[0]))) {
        let of_nic = pairs.iter().copied().filter(|p| (p.nic.as_str(), p.boots[0]) == key);
        let of_nic: Vec<&Pair> = of_nic.collect();
        let first = of_nic[0].verdict;
        if first != Verdict::Differs && of_nic.iter().all(|p| p.verdict == first) {
            add(&mut findings, &of_nic);
        } else {
            of_nic.chunks(1).for_each(|one| add(&mut findings, one));
        }
    }
    let (differ, rest): (Vec<_>, Vec<_>) = findings.iter().partition(|f| f.verdict == Verdict::Differs);
    differ.into_iter().chain(rest).map(Finding::sentence).collect()
}

/// Adds pairs of one NIC and one verdict to the finding that says the same of other NICs, or as a new one.
fn add<'a>(findings: &mut Vec<Finding<'a>>, pairs: &[&'a Pair]) {
    let Some(first) = pairs.first() else { return };
    let (verdict, nic) = (first.verdict, &first.nic);
    let up = verdict == Verdict::Differs && first.ratio.median > 1.0;
    let modes = distinct(pairs.iter().flat_map(|p| [p.baseline.as_str(), &p.mode]));
    match findings.iter_mut().find(|f| f.verdict == verdict && f.up == up && f.modes == modes) {
        Some(finding) => {
            finding.nics.push(nic);
            finding.pairs.extend(pairs);
        }
        None => findings.push(Finding { verdict, up, modes, nics: vec![nic], pairs: pairs.to_vec() }),
    }
}

impl Finding<'_> {
    fn sentence(&self) -> String {
        match self.pairs.as_slice() {
            [one] => one.sentence.clone(),
            many if self.verdict == Verdict::Differs => differ(many),
            many => {
                format!(
                    "{}: {}",
                    list(&self.nics),
                    undecided(self.verdict, many[0].metric, &self.modes, many)
                )
            }
        }
    }
}

/// One sentence for every mode that could not take turns with others.
fn across(comparison: &Comparison) -> Vec<String> {
    let apart: Vec<&Pair> = (comparison.pairs.iter())
        .filter(|p| p.metric == Metric::ForwardPps && p.verdict == Verdict::NotInterleaved)
        .collect();
    let modes = distinct(apart.iter().map(|p| p.mode.as_str()));
    let sentence = |mode: &str| {
        let of_mode: Vec<&Pair> = apart.iter().copied().filter(|p| p.mode == mode).collect();
        let place =
            if of_mode.iter().all(|p| p.boots[0] == p.boots[1]) { "other rounds" } else { "another boot" };
        let on_nics = of_mode.chunk_by(|a, b| a.nic == b.nic).map(|pairs| {
            let times = pairs.iter().map(|p| format!("{:.2} × {}", p.ratio.median, p.baseline));
            format!("{} on {}", list(&times.collect::<Vec<_>>()), pairs[0].nic)
        });
        let on_nics = on_nics.collect::<Vec<_>>().join("; ");
        format!("{mode} ran in {place}, so this is no verdict: its forwarding rate was {on_nics}")
    };
    modes.into_iter().map(sentence).collect()
}
