//! A view on a terminal, and as text.

use comfy_table::{CellAlignment, Table as TextTable, presets};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Style, Stylize as _};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph, Row, Table};

use crate::view::{LcoreView, PortView, ProcessView, View, short};

/// Column of a port: heading, width on a terminal, and content.
type Column = (&'static str, u16, fn(&PortView) -> String);

const COLUMNS: [Column; 8] = [
    ("port", 4, |port| port.port.to_string()),
    ("device", 18, |port| port.name.clone()),
    ("mode", 12, |port| port.mode.clone().unwrap_or_else(|| "-".into())),
    ("link", 10, PortView::link),
    ("RX pps", 8, |port| short(port.rx_pps)),
    ("TX pps", 8, |port| short(port.tx_pps)),
    ("RX bit/s", 8, |port| short(port.rx_bps)),
    ("TX bit/s", 8, |port| short(port.tx_bps)),
];
/// Number of columns that are text. The others are numbers.
const TEXTS: usize = 4;
/// Width of the bar of an lcore.
const BAR: usize = 10;

fn title(process: &ProcessView) -> String {
    let ProcessView { program, pid, version, socket, .. } = process;
    format!("{program} (pid {pid}, {version}) {}", socket.display())
}

fn losses(process: &ProcessView) -> impl Iterator<Item = (String, bool)> {
    process.ports.iter().filter(|port| !port.drops.is_empty()).map(|port| {
        let is_now = port.drops.iter().any(|drop| drop.per_second > 0.0);
        (format!("port {} lost: {}", port.port, port.losses()), is_now)
    })
}

fn lcore(LcoreView { lcore, busy, .. }: &LcoreView) -> String {
    let Some(busy) = busy else { return format!("lcore {lcore} -") };
    let full = (busy * BAR as f64).round() as usize;
    format!(
        "lcore {lcore} {}{} {:.0} %",
        "█".repeat(full),
        "░".repeat(BAR.saturating_sub(full)),
        100.0 * busy
    )
}

/// Draws the view. `status` is the last line.
pub(crate) fn draw(frame: &mut Frame<'_>, view: &View, status: &str) {
    let height = |process: &ProcessView| {
        let lines =
            1 + process.ports.len() + losses(process).count() + usize::from(!process.lcores.is_empty());
        2 + lines as u16
    };
    let heights = view.processes.iter().map(|process| Constraint::Length(height(process)));
    let areas = Layout::vertical(heights.chain([Constraint::Min(1)])).split(frame.area());
    for (process, area) in view.processes.iter().zip(areas.iter()) {
        let block = Block::bordered().title(title(process));
        let inside = block.inner(*area);
        frame.render_widget(block, *area);
        let [table, rest] =
            Layout::vertical([Constraint::Length(1 + process.ports.len() as u16), Constraint::Min(0)])
                .areas(inside);
        frame.render_widget(ports(process), table);
        let lost = losses(process).map(|(text, is_now)| {
            Line::from(Span::styled(text, if is_now { Style::new().fg(Color::Red) } else { Style::new() }))
        });
        let lcores: Vec<String> = process.lcores.iter().map(lcore).collect();
        frame.render_widget(
            Paragraph::new(lost.chain([Line::from(lcores.join("   "))]).collect::<Vec<_>>()),
            rest,
        );
    }
    if let Some(area) = areas.last() {
        frame.render_widget(Paragraph::new(status.to_owned()).dim(), *area);
    }
}

fn ports(process: &ProcessView) -> Table<'static> {
    let aligned = |number: usize, text: String, width: u16| match number < TEXTS {
        true => text,
        false => format!("{text:>width$}", width = width.into()),
    };
    let row = |of: &dyn Fn(usize) -> String| {
        Row::new(
            COLUMNS
                .iter()
                .enumerate()
                .map(|(number, (_, width, _))| aligned(number, of(number), *width))
                .collect::<Vec<_>>(),
        )
    };
    let rows: Vec<Row<'_>> =
        process.ports.iter().map(|port| row(&|number| COLUMNS[number].2(port))).collect();
    let header = row(&|number| COLUMNS[number].0.to_owned()).bold();
    Table::new(rows, COLUMNS.map(|(_, width, _)| Constraint::Length(width))).header(header)
}

/// The view as text, for a pipe.
pub(crate) fn text(view: &View) -> String {
    let mut text = String::new();
    for process in &view.processes {
        let mut table = TextTable::new();
        table.load_style(presets::NOTHING).set_header(COLUMNS.map(|(heading, ..)| heading));
        for port in &process.ports {
            table.add_row(COLUMNS.map(|(.., content)| content(port)));
        }
        for column in table.column_iter_mut().skip(TEXTS) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        text += &format!("{}\n{table}\n", title(process));
        text.extend(losses(process).map(|(line, _)| line + "\n"));
        let lcores: Vec<String> = process.lcores.iter().map(lcore).collect();
        text += &format!("{}\n", lcores.join("   "));
    }
    text
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::view::tests::view;

    #[test]
    fn a_terminal_and_a_pipe_show_the_same() {
        let mut terminal = Terminal::new(TestBackend::new(100, 8)).unwrap();
        terminal.draw(|frame| draw(frame, &view(), "q quits")).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y: u16| (0..100).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        let screen: Vec<String> = (0..8).map(line).collect();
        let shown = [
            "DPDK 25.11.0) /run/dpdk/rte/dpdk_telemetry.v2",
            "port device             mode         link         RX pps   TX pps",
            "3    0000:03:00.0       -            10 Gbit/s    1.00 M        0    480 M        0",
            "port 3 lost: rx_missed_errors 200100 (+100 k/s), tx_errors 4",
            "lcore 1 ███░░░░░░░ 25 %",
            "",
            "q quits",
        ];
        for (line, shown) in screen.iter().zip(shown) {
            assert!(line.contains(shown), "{screen:#?}");
        }
        for word in ["0000:03:00.0", "10 Gbit/s", "1.00 M", "rx_missed_errors 200100 (+100 k/s)", "25 %"] {
            assert!(text(&view()).contains(word), "{}", text(&view()));
        }
    }

    #[test]
    fn a_terminal_that_is_too_small_shows_a_part() {
        for (width, height) in [(1, 1), (10, 3), (40, 4), (300, 2)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            terminal.draw(|frame| draw(frame, &view(), "q quits")).unwrap();
        }
    }
}
