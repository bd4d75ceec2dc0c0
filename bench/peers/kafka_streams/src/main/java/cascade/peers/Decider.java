package cascade.peers;

import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.PropertyNamingStrategies;
import java.io.IOException;
import java.io.UncheckedIOException;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.processor.api.RecordMetadata;
import org.apache.kafka.streams.state.KeyValueStore;

/** Decides each transaction: reads its message and forwards the message of its decision. */
final class Decider implements Processor<byte[], byte[], byte[], byte[]> {
    static final String CARDS = "cards";
    static final String TERMINALS = "terminals";
    private static final double HOUR_MS = 3_600_000.0;
    private static final ObjectMapper JSON =
        new ObjectMapper().setPropertyNamingStrategy(PropertyNamingStrategies.SNAKE_CASE);

    record Transaction(
        long transactionId, long eventTime, long cardId, long terminalId, double amount, String entryMode) {}

    private final Models models;
    private final int amount;
    private final int hour;
    private final int night;
    private final int weekend;
    private final int sinceLast;
    private final int[] cardCount;
    private final int[] cardMean;
    private final int[] cardRatio;
    private final int[] terminalCount;
    private final int[] terminalMean;
    private ProcessorContext<byte[], byte[]> context;
    private KeyValueStore<Long, CardState> cards;
    private KeyValueStore<Long, DayTotals> terminals;

    Decider(Models models) {
        this.models = models;
        amount = models.column("amount");
        hour = models.column("hour");
        night = models.column("night");
        weekend = models.column("weekend");
        sinceLast = models.column("card_seconds_since_last");
        cardCount = models.columns("card_count_");
        cardMean = models.columns("card_amount_mean_");
        cardRatio = models.columns("card_amount_ratio_to_mean_");
        terminalCount = models.columns("terminal_count_");
        terminalMean = models.columns("terminal_amount_mean_");
    }

    @Override
    public void init(ProcessorContext<byte[], byte[]> context) {
        this.context = context;
        cards = context.getStateStore(CARDS);
        terminals = context.getStateStore(TERMINALS);
    }

    @Override
    public void process(Record<byte[], byte[]> record) {
        try {
            Transaction transaction = JSON.readValue(record.value(), Transaction.class);
            CardState card = cards.get(transaction.cardId());
            card = card == null ? new CardState() : card;
            DayTotals terminal = terminals.get(transaction.terminalId());
            terminal = terminal == null ? new DayTotals() : terminal;
            models.row[sinceLast] = card.add(transaction.eventTime(), transaction.amount());
            terminal.add(transaction.eventTime(), transaction.amount());
            cards.put(transaction.cardId(), card);
            terminals.put(transaction.terminalId(), terminal);
            transactionFeatures(transaction);
            keyFeatures(card, terminal, transaction.amount());
            RecordMetadata metadata = context.recordMetadata().orElseThrow();
            String id = metadata.topic() + "-" + metadata.partition() + "-" + metadata.offset();
            Decision decision = models.decide(transaction, card, id, record.timestamp());
            context.forward(record.withValue(JSON.writeValueAsBytes(decision)));
        } catch (IOException error) {
            throw new UncheckedIOException(error);
        }
    }

    private void transactionFeatures(Transaction transaction) {
        double hourOfDay = transaction.eventTime() % DayTotals.DAY_MS / HOUR_MS;
        models.row[amount] = transaction.amount();
        models.row[hour] = hourOfDay;
        models.row[night] = hourOfDay < 6 ? 1 : 0;
        // day 0 was a Thursday
        models.row[weekend] = (transaction.eventTime() / DayTotals.DAY_MS + 3) % 7 >= 5 ? 1 : 0;
    }

    private void keyFeatures(CardState card, DayTotals terminal, double paid) {
        double[] row = models.row;
        for (int window = 0; window < cardCount.length; window++) {
            row[cardCount[window]] = card.totals.counts[window];
            row[cardMean[window]] = card.totals.sums[window] / card.totals.counts[window];
            row[cardRatio[window]] = card.ratioToMean(window, paid);
            row[terminalCount[window]] = terminal.counts[window];
            row[terminalMean[window]] = terminal.sums[window] / terminal.counts[window];
        }
    }

    @Override
    public void close() {
        models.close();
    }
}
