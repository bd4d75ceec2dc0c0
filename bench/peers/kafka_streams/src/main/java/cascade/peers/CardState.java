package cascade.peers;

import java.nio.ByteBuffer;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;

/** The state of a card: its days, and its last 16 transactions, the oldest first. */
final class CardState {
    static final Serde<CardState> SERDE =
        Serdes.serdeFrom((topic, card) -> card == null ? null : card.bytes(), (topic, bytes) -> read(bytes));
    static final int STEPS_MAX = 16;
    private static final int STEP_BYTES = Long.BYTES + 2 * Double.BYTES;

    final DayTotals totals;
    final long[] times = new long[STEPS_MAX];
    final double[] amounts = new double[STEPS_MAX];
    /** Each amount over the mean of the amounts before it within 30 days. */
    final double[] ratios = new double[STEPS_MAX];
    int steps;

    CardState() {
        this(new DayTotals());
    }

    private CardState(DayTotals totals) {
        this.totals = totals;
    }

    private static CardState read(byte[] bytes) {
        if (bytes == null) {
            return null;
        }
        ByteBuffer in = ByteBuffer.wrap(bytes);
        CardState found = new CardState(DayTotals.from(in));
        found.steps = in.getInt();
        for (int at = 0; at < found.steps; at++) {
            found.times[at] = in.getLong();
            found.amounts[at] = in.getDouble();
            found.ratios[at] = in.getDouble();
        }
        return found;
    }

    private byte[] bytes() {
        ByteBuffer out = ByteBuffer.allocate(totals.length() + Integer.BYTES + steps * STEP_BYTES);
        totals.write(out);
        out.putInt(steps);
        for (int at = 0; at < steps; at++) {
            out.putLong(times[at]).putDouble(amounts[at]).putDouble(ratios[at]);
        }
        return out.array();
    }

    /** Adds a transaction; returns the seconds since the transaction before it, or -1 for the first. */
    double add(long timeMs, double amount) {
        double sinceLast = steps == 0 ? -1.0 : (timeMs - times[steps - 1]) / 1e3;
        totals.add(timeMs, amount);
        if (steps == STEPS_MAX) {
            steps--;
            System.arraycopy(times, 1, times, 0, steps);
            System.arraycopy(amounts, 1, amounts, 0, steps);
            System.arraycopy(ratios, 1, ratios, 0, steps);
        }
        times[steps] = timeMs;
        amounts[steps] = amount;
        ratios[steps++] = ratioToMean(2, amount);
        return sinceLast;
    }

    /** The last amount over the mean of the others in window 0, 1 or 2; 1 where there are no others. */
    double ratioToMean(int window, double amount) {
        int others = totals.counts[window] - 1;
        double sum = totals.sums[window] - amount;
        return others > 0 && sum > 0 ? amount * others / sum : 1.0;
    }
}
