//! Summarizes the comparison in as few sentences as cover every pair of modes.

use crate::compare::{Comparison, Family, Metric, Pair, Verdict};
use crate::words::{differ, distinct, list, not_different};

/// Returns sentences that cover every pair of modes, grouped under headings. Equal verdicts share a sentence.
pub(crate) fn headlines(comparison: &Comparison) -> Vec<(&'static str, Vec<String>)> {
    let mut groups = Vec::new();
    for metric in Metric::OF_RUNS.into_iter().chain(Metric::OF_MAPS) {
        let pairs = comparison.pairs.iter();
        let of_metric = pairs.filter(|p| p.metric == metric && p.verdict != Verdict::NotInterleaved);
        let sentences = sentences(&of_metric.collect::<Vec<_>>(), &comparison.family);
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

/// Pairs covered by one sentence: the same modes with the same verdict on several subjects.
struct Finding<'a> {
    verdict: Verdict,
    /// Whether the quantity is larger, if the modes differ.
    up: bool,
    modes: Vec<&'a str>,
    pairs: Vec<&'a Pair>,
}

fn sentences(pairs: &[&Pair], family: &Family) -> Vec<String> {
    let mut findings: Vec<Finding<'_>> = Vec::new();
    for of_subject in pairs.chunk_by(|a, b| (&a.subject, a.boots[0]) == (&b.subject, b.boots[0])) {
        let first = of_subject[0].verdict;
        if first != Verdict::Differs && of_subject.iter().all(|p| p.verdict == first) {
            add(&mut findings, of_subject);
        } else {
            of_subject.chunks(1).for_each(|one| add(&mut findings, one));
        }
    }
    let (differ, rest): (Vec<_>, Vec<_>) = findings.iter().partition(|f| f.verdict == Verdict::Differs);
    differ.into_iter().chain(rest).map(|finding| finding.sentence(family)).collect()
}

/// Adds pairs of one subject and one verdict to the finding that states the same for other subjects, or to a
/// new one.
fn add<'a>(findings: &mut Vec<Finding<'a>>, pairs: &[&'a Pair]) {
    let Some(first) = pairs.first() else { return };
    let verdict = first.verdict;
    let up = verdict == Verdict::Differs && first.ratio > 1.0;
    let modes = distinct(pairs.iter().flat_map(|p| [p.baseline.as_str(), &p.mode]));
    match findings.iter_mut().find(|f| f.verdict == verdict && f.up == up && f.modes == modes) {
        Some(finding) => finding.pairs.extend(pairs),
        None => findings.push(Finding { verdict, up, modes, pairs: pairs.to_vec() }),
    }
}

impl Finding<'_> {
    fn sentence(&self, family: &Family) -> String {
        match self.pairs.as_slice() {
            [one] => one.sentence.clone(),
            many if self.verdict == Verdict::Differs => differ(many),
            many => {
                let subjects = list(&distinct(many.iter().map(|pair| &pair.subject)));
                let noun = many[0].metric.noun();
                format!("{subjects}: {noun} {}", not_different(self.verdict, many, family))
            }
        }
    }
}

/// Returns one sentence per mode that could not be interleaved with others.
fn across(comparison: &Comparison) -> Vec<String> {
    let apart: Vec<&Pair> = (comparison.pairs.iter())
        .filter(|p| p.metric == Metric::ForwardPps && p.verdict == Verdict::NotInterleaved)
        .collect();
    let modes = distinct(apart.iter().map(|p| p.mode.as_str()));
    let sentence = |mode: &str| {
        let of_mode: Vec<&Pair> = apart.iter().copied().filter(|p| p.mode == mode).collect();
        let place =
            if of_mode.iter().all(|p| p.boots[0] == p.boots[1]) { "other rounds" } else { "another boot" };
        let on_nics = of_mode.chunk_by(|a, b| a.subject == b.subject).map(|pairs| {
            let times = pairs.iter().map(|p| format!("{:.2} × {}", p.ratio, p.baseline));
            format!("{} on {}", list(&times.collect::<Vec<_>>()), pairs[0].subject)
        });
        let on_nics = on_nics.collect::<Vec<_>>().join("; ");
        format!("{mode} ran in {place}, so this is not a verdict: its forwarding rate was {on_nics}")
    };
    modes.into_iter().map(sentence).collect()
}
